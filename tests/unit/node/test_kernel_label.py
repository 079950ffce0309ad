"""`recess inspect` and `recess doctor` name the kernel that machines run."""

from recess.config import load_config
from recess.images import kernels
from recess.node.doctor import read_kernel
from recess.node.imageadmin import ImageAdmin
from tests.unit.images.test_kernel import elf


async def test_a_machine_s_kernel_is_named_by_the_hash_in_its_notes(tmp_path):
    config = load_config({}, home=str(tmp_path))
    made = kernels.install(config.images_dir, kernels.TRIMMED, elf(), "linux-source 6.12")
    admin = ImageAdmin(config, None, None, lambda line: None)
    assert await admin.kernel({"vm": {"kernel": made.hash}}) == made.label
    assert await admin.kernel({}) == ""


def test_doctor_reads_what_new_machines_get(tmp_path):
    config = load_config({}, home=str(tmp_path))
    assert read_kernel(config) == ("", "")
    made = kernels.install(config.images_dir, kernels.TRIMMED, elf(), "linux-source 6.12")
    assert read_kernel(config) == (made.label, "")
    assert read_kernel(load_config({}, home=str(tmp_path), kernel="debian")) == ("", "")
    assert read_kernel(load_config({}, home=str(tmp_path), kernel="nonsense"))[1].startswith("no such kernel")

"""Room `catalog`: typed rows of machines, snapshots, templates, agent versions, nodes and tokens. JSON in, JSON out."""

from recess.catalog.agents import AgentRows, AgentVersion, agent_version
from recess.catalog.catalog import Catalog
from recess.catalog.machines import MachineRecord, MachineRows
from recess.catalog.migrations import SCHEMA
from recess.catalog.names import check_name
from recess.catalog.nodes import NodeRecord, NodeRows, TokenRecord, TokenRows
from recess.catalog.snapshots import SnapshotRecord, SnapshotRows
from recess.catalog.table import Damaged
from recess.catalog.templates import TemplateRecord, TemplateRows

__all__ = [
    "SCHEMA",
    "AgentRows",
    "AgentVersion",
    "Catalog",
    "Damaged",
    "MachineRecord",
    "MachineRows",
    "NodeRecord",
    "NodeRows",
    "SnapshotRecord",
    "SnapshotRows",
    "TemplateRecord",
    "TemplateRows",
    "TokenRecord",
    "TokenRows",
    "agent_version",
    "check_name",
]

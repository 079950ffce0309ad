//! System calls made by another process at our request: the one way to get a userfaultfd of an unpatched VMM.
//!
//! The main thread is seized and interrupted, its program counter is set to a `syscall` instruction of the vDSO, it is
//! stepped once, and its registers are put back as they were: to the program nothing has happened, except what the
//! call did. A system call that the interruption cut short is begun again by the kernel. 0.2 to 0.7 ms. The caller must
//! be an ancestor with the same user, or root (Yama 0 and 1); only x86-64.
//!
//! If the thread cannot be let go again with its own registers the process is killed: it would run wild.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::sys::{self, Remote, Way};

/// Number and up to six arguments.
pub type Call = [u64; 7];

const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Makes r12 calls from the table at rbx, and stops at the trap behind it; a call that fails leaves r12 above zero.
const LOOP: [u8; 52] = [
    0x4d, 0x85, 0xe4, // 0: test r12, r12
    0x74, 0x2e, // je 2
    0x48, 0x8b, 0x03, // mov rax, [rbx]
    0x48, 0x8b, 0x7b, 0x08, // mov rdi, [rbx + 8]
    0x48, 0x8b, 0x73, 0x10, // mov rsi, [rbx + 16]
    0x48, 0x8b, 0x53, 0x18, // mov rdx, [rbx + 24]
    0x4c, 0x8b, 0x53, 0x20, // mov r10, [rbx + 32]
    0x4c, 0x8b, 0x43, 0x28, // mov r8, [rbx + 40]
    0x4c, 0x8b, 0x4b, 0x30, // mov r9, [rbx + 48]
    0x0f, 0x05, // syscall
    0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff, // cmp rax, -4095
    0x73, 0x09, // jae 2
    0x48, 0x83, 0xc3, 0x38, // add rbx, 56
    0x49, 0xff, 0xcc, // dec r12
    0xeb, 0xcd, // jmp 0
    0xcc, // 2: int3
];
/// The vDSO is two pages; anything far beyond is not one.
const VDSO_LIMIT: u64 = 1 << 20;
/// Room for `/proc/PID/fd/N` and the zero behind it.
const PATH: usize = 48;

/// Have process `pid` make these calls and return their results; a negative one is an errno of that call.
pub fn system_calls(pid: libc::pid_t, calls: &[Call]) -> io::Result<Vec<i64>> {
    let instruction = find_instruction(pid)?;
    let mut held = Held::take(pid)?;
    let done = calls
        .iter()
        .map(|call| held.step(instruction, call))
        .collect();
    held.release()?;
    done
}

/// Have process `pid` open these files of ours (`/proc/OURS/fd/N`) for reading, and return its numbers for them. A path
/// is handed over in a page that is mapped there for as long as this takes.
pub fn open_ours(pid: libc::pid_t, files: &[OwnedFd]) -> io::Result<Vec<u64>> {
    let access = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let bytes = (files.len() * PATH).next_multiple_of(sys::PAGE) as u64;
    let map = [libc::SYS_mmap as u64, 0, bytes, access, flags, u64::MAX, 0];
    let page = result(system_calls(pid, &[map])?[0])?;
    let me = std::process::id();
    let mut paths = vec![0u8; files.len() * PATH];
    for (place, file) in paths.chunks_exact_mut(PATH).zip(files) {
        let path = format!("/proc/{me}/fd/{}", file.as_raw_fd());
        place[..path.len()].copy_from_slice(path.as_bytes());
    }
    let there = [Remote {
        address: page,
        bytes: paths.len(),
    }];
    let here = [sys::local(paths.as_mut_ptr(), paths.len())];
    let written = sys::process_vm(&Way::Write, pid, &here, &there);
    let flags = (libc::O_RDONLY | libc::O_CLOEXEC) as u64;
    let open = libc::SYS_openat as u64;
    let mut calls: Vec<Call> = Vec::new();
    if written.is_ok() {
        let at = (0..files.len()).map(|number| page + (number * PATH) as u64);
        calls.extend(at.map(|at| [open, libc::AT_FDCWD as u64, at, flags, 0, 0, 0]));
    }
    calls.push([libc::SYS_munmap as u64, page, bytes, 0, 0, 0, 0]);
    let results = system_calls(pid, &calls)?;
    written?;
    let opened: Vec<u64> = results[..files.len()]
        .iter()
        .filter_map(|&r| result(r).ok())
        .collect();
    if opened.len() < files.len() {
        close(pid, &opened)?;
        let failed = results.iter().find(|&&r| r < 0).copied().unwrap_or(0);
        return Err(io::Error::from_raw_os_error(-failed as i32));
    }
    Ok(opened)
}

/// Have process `pid` close descriptors.
pub fn close(pid: libc::pid_t, descriptors: &[u64]) -> io::Result<()> {
    let calls: Vec<Call> = descriptors
        .iter()
        .map(|&fd| [libc::SYS_close as u64, fd, 0, 0, 0, 0, 0])
        .collect();
    system_calls(pid, &calls).map(|_| ())
}

/// What a system call returned, as a number or an error.
pub fn result(returned: i64) -> io::Result<u64> {
    u64::try_from(returned).map_err(|_| io::Error::from_raw_os_error(-returned as i32))
}

/// Have process `pid` make these calls one after the other, at its own speed: hundreds cost little more than one. Ends with
/// the first that fails, whose error this returns. A loop of a few instructions is put into a page of its own, run, and
/// taken away; where no page may be made executable, the calls are stepped through one by one.
pub fn run_all(pid: libc::pid_t, calls: &[Call]) -> io::Result<()> {
    let instruction = find_instruction(pid)?;
    let mut held = Held::take(pid)?;
    let done = held.run_all(instruction, calls);
    held.release()?;
    done
}

fn find_instruction(pid: libc::pid_t) -> io::Result<u64> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let (from, to) = vdso_range(&maps).ok_or_else(|| other("the process has no vDSO"))?;
    let mut code = vec![0u8; (to - from) as usize];
    let there = [Remote {
        address: from,
        bytes: code.len(),
    }];
    sys::process_vm(
        &Way::Read,
        pid,
        &[sys::local(code.as_mut_ptr(), code.len())],
        &there,
    )?;
    let at = code.windows(2).position(|pair| pair == SYSCALL);
    at.map(|at| from + at as u64)
        .ok_or_else(|| other("no system call instruction in the vDSO"))
}

fn vdso_range(maps: &str) -> Option<(u64, u64)> {
    let line = maps.lines().find(|line| line.ends_with(" [vdso]"))?;
    let (from, to) = line.split(' ').next()?.split_once('-')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let (from, to) = (hex(from)?, hex(to)?);
    (from < to && to - from <= VDSO_LIMIT).then_some((from, to))
}

fn other(why: &str) -> io::Error {
    io::Error::other(why)
}

/// A thread that stands still under our hand.
struct Held {
    pid: libc::pid_t,
    registers: libc::user_regs_struct,
    /// Signals that came meanwhile: handed on at the end.
    signals: Vec<libc::c_int>,
}

impl Held {
    fn take(pid: libc::pid_t) -> io::Result<Held> {
        request(libc::PTRACE_SEIZE, pid, 0)?;
        let mut held = Held {
            pid,
            // SAFETY: all-zero is a valid set of registers; they are read before they are used.
            registers: unsafe { std::mem::zeroed() },
            signals: Vec::new(),
        };
        let stopped = request(libc::PTRACE_INTERRUPT, pid, 0)
            .and_then(|()| held.wait_stop(libc::PTRACE_CONT));
        if let Err(error) = stopped.and_then(|()| held.read(None)) {
            held.release_or_kill();
            return Err(error);
        }
        Ok(held)
    }

    /// Wait for the stop that we asked for. Signals on their way to the program are kept for later, and the thread goes
    /// on with `resume`.
    fn wait_stop(&mut self, resume: libc::c_uint) -> io::Result<()> {
        loop {
            let mut status = 0;
            // Looked at first and not taken: an exit status belongs to whoever buries the VMM.
            // SAFETY: all-zero is a valid siginfo, and it is ours.
            let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
            let flags = libc::WEXITED | libc::WSTOPPED | libc::WNOWAIT | libc::__WALL;
            sys::check(unsafe {
                libc::waitid(libc::P_PID, self.pid as libc::id_t, &raw mut info, flags)
            })?;
            if info.si_code != libc::CLD_TRAPPED && info.si_code != libc::CLD_STOPPED {
                return Err(other("the process has ended"));
            }
            // SAFETY: plain wait for a child that has stopped; the flags keep an exit from being taken.
            sys::check(unsafe { libc::waitpid(self.pid, &raw mut status, libc::__WALL) })?;
            let signal = libc::WSTOPSIG(status);
            if signal == libc::SIGTRAP || status >> 16 == libc::PTRACE_EVENT_STOP {
                return Ok(());
            }
            self.signals.push(signal);
            request(resume, self.pid, 0)?;
        }
    }

    fn read(&mut self, into: Option<&mut libc::user_regs_struct>) -> io::Result<()> {
        let target = into.unwrap_or(&mut self.registers);
        request(
            libc::PTRACE_GETREGS,
            self.pid,
            std::ptr::from_mut(target) as usize,
        )
    }

    fn write(&self, registers: &libc::user_regs_struct) -> io::Result<()> {
        request(
            libc::PTRACE_SETREGS,
            self.pid,
            std::ptr::from_ref(registers) as usize,
        )
    }

    fn step(&mut self, instruction: u64, call: &Call) -> io::Result<i64> {
        let mut registers = self.registers;
        registers.orig_rax = u64::MAX; // no call is being restarted while ours is made
        registers.rip = instruction;
        [
            registers.rax,
            registers.rdi,
            registers.rsi,
            registers.rdx,
            registers.r10,
            registers.r8,
            registers.r9,
        ] = *call;
        self.write(&registers)?;
        request(libc::PTRACE_SINGLESTEP, self.pid, 0)?;
        self.wait_stop(libc::PTRACE_SINGLESTEP)?;
        self.read(Some(&mut registers))?;
        Ok(registers.rax as i64)
    }

    fn run_all(&mut self, instruction: u64, calls: &[Call]) -> io::Result<()> {
        let access = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let bytes = sys::PAGE + std::mem::size_of_val(calls).next_multiple_of(sys::PAGE);
        let map = [
            libc::SYS_mmap as u64,
            0,
            bytes as u64,
            access,
            flags,
            u64::MAX,
            0,
        ];
        let page = result(self.step(instruction, &map)?)?;
        let done = match self.load(instruction, page, calls) {
            Ok(()) => self.run_loop(page, calls.len()),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => calls
                .iter()
                .try_for_each(|call| result(self.step(instruction, call)?).map(|_| ())),
            Err(error) => Err(error),
        };
        let unmap = [libc::SYS_munmap as u64, page, bytes as u64, 0, 0, 0, 0];
        self.step(instruction, &unmap)?;
        done
    }

    /// Put the loop into the first page at `page` and the table behind it.
    fn load(&mut self, instruction: u64, page: u64, calls: &[Call]) -> io::Result<()> {
        let mut image = LOOP.to_vec();
        image.resize(sys::PAGE, 0);
        image.extend(calls.iter().flatten().flat_map(|word| word.to_ne_bytes()));
        let there = [Remote {
            address: page,
            bytes: image.len(),
        }];
        let here = [sys::local(image.as_mut_ptr(), image.len())];
        sys::process_vm(&Way::Write, self.pid, &here, &there)?;
        let access = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        let number = libc::SYS_mprotect as u64;
        let protect = [number, page, sys::PAGE as u64, access, 0, 0, 0];
        result(self.step(instruction, &protect)?).map(|_| ())
    }

    fn run_loop(&mut self, page: u64, count: usize) -> io::Result<()> {
        let mut registers = self.registers;
        registers.orig_rax = u64::MAX;
        registers.rip = page;
        registers.rbx = page + sys::PAGE as u64;
        registers.r12 = count as u64;
        self.write(&registers)?;
        // Any stop but the one at the trap is somebody else's: it goes on.
        while registers.rip != page + LOOP.len() as u64 {
            request(libc::PTRACE_CONT, self.pid, 0)?;
            self.wait_stop(libc::PTRACE_CONT)?;
            self.read(Some(&mut registers))?;
        }
        match registers.r12 {
            0 => Ok(()),
            _ => result(registers.rax as i64).map(|_| ()),
        }
    }

    /// Put the registers back and let the thread go on.
    fn release(mut self) -> io::Result<()> {
        let restored = self.write(&self.registers);
        if restored.is_err() {
            self.release_or_kill();
            return restored;
        }
        self.detach()
    }

    fn detach(&mut self) -> io::Result<()> {
        request(libc::PTRACE_DETACH, self.pid, 0)?;
        for signal in self.signals.drain(..) {
            // SAFETY: no memory involved; the process is our child and has not been waited for.
            unsafe { libc::syscall(libc::SYS_tgkill, self.pid, self.pid, signal) };
        }
        Ok(())
    }

    fn release_or_kill(&mut self) {
        if self.detach().is_err() {
            // SAFETY: as above. It may be gone already.
            unsafe { libc::kill(self.pid, libc::SIGKILL) };
        }
    }
}

fn request(what: libc::c_uint, pid: libc::pid_t, data: usize) -> io::Result<()> {
    // SAFETY: `data` is 0 or the address of a register set that outlives the call.
    let ret = unsafe { libc::ptrace(what, pid, 0usize, data) };
    sys::check(if ret < 0 { -1 } else { 0 }).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A child that answers each byte on its standard input: it is in a read when it is interrupted.
    fn echo() -> std::process::Child {
        std::process::Command::new("/bin/cat")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap()
    }

    #[test]
    fn calls_are_made_and_the_program_does_not_notice() {
        use std::io::{Read, Write};
        let mut child = echo();
        let pid = child.id() as libc::pid_t;
        for round in 0..50u8 {
            let mut back = [0];
            child.stdin.as_mut().unwrap().write_all(&[99]).unwrap(); // an answer: it is loaded whole
            child
                .stdout
                .as_mut()
                .unwrap()
                .read_exact(&mut back)
                .unwrap();
            let calls = [
                [libc::SYS_getpid as u64, 0, 0, 0, 0, 0, 0],
                [libc::SYS_close as u64, 999, 0, 0, 0, 0, 0],
            ];
            let expect = vec![i64::from(pid), -i64::from(libc::EBADF)];
            assert_eq!(system_calls(pid, &calls).unwrap(), expect);
            child.stdin.as_mut().unwrap().write_all(&[round]).unwrap();
            let mut back = [0];
            child
                .stdout
                .as_mut()
                .unwrap()
                .read_exact(&mut back)
                .unwrap();
            assert_eq!(back, [round]);
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn many_calls_run_at_once_until_one_fails() {
        use std::io::{Read, Write};
        let mut child = echo();
        let pid = child.id() as libc::pid_t;
        let pass = |child: &mut std::process::Child| {
            let mut back = [0];
            child.stdin.as_mut().unwrap().write_all(&[7]).unwrap();
            let out = child.stdout.as_mut().unwrap();
            out.read_exact(&mut back).unwrap();
            back[0]
        };
        assert_eq!(pass(&mut child), 7);
        let dup = |to: u64| [libc::SYS_dup2 as u64, 0, to, 0, 0, 0, 0];
        let calls: Vec<Call> = (100..900).map(dup).collect();
        run_all(pid, &calls).unwrap();
        let there = |n: u64| std::path::Path::new(&format!("/proc/{pid}/fd/{n}")).is_symlink();
        assert!(there(100) && there(899) && !there(900));
        assert_eq!(pass(&mut child), 7);
        let close = |fd: u64| [libc::SYS_close as u64, fd, 0, 0, 0, 0, 0];
        let error = run_all(pid, &[close(100), close(1000), close(101)]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        assert!(!there(100) && there(101));
        run_all(pid, &[]).unwrap();
        assert_eq!(pass(&mut child), 7);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_process_that_is_gone_is_an_error() {
        let mut child = echo();
        let pid = child.id() as libc::pid_t;
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(system_calls(pid, &[[libc::SYS_getpid as u64, 0, 0, 0, 0, 0, 0]]).is_err());
    }

    #[test]
    fn the_vdso_is_found_in_the_list_of_mappings() {
        let maps = "7ffc1000-7ffc2000 rw-p 00000000 00:00 0    [stack]\n7ffd1000-7ffd3000 r-xp 00000000 00:00 0  [vdso]\n";
        assert_eq!(vdso_range(maps), Some((0x7ffd_1000, 0x7ffd_3000)));
        assert_eq!(vdso_range("1000-2000 r-xp 0 00:00 0 [vdso"), None);
        assert_eq!(vdso_range("1000-fffff000 r-xp 0 00:00 0 [vdso]"), None);
    }
}

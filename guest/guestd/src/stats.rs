//! Numbers of the guest, straight from /proc.

use std::fs;

use crate::json::{obj, Value};

/// One field of /proc/meminfo in bytes.
pub fn meminfo(text: &str, key: &str) -> i64 {
    text.lines()
        .find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))
        .and_then(|v| v.split_ascii_whitespace().next()?.parse::<i64>().ok())
        .map_or(0, |kib| kib * 1024)
}

/// How many processes the kernel has ended for want of memory since it booted (proc/vmstat, since Linux 4.13).
pub fn oom_kills(vmstat: &str) -> i64 {
    vmstat
        .lines()
        .find_map(|l| l.strip_prefix("oom_kill ")?.trim().parse().ok())
        .unwrap_or(0)
}

/// Seconds since boot.
pub fn uptime_s() -> f64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split_ascii_whitespace()
        .next()
        .and_then(|t| t.parse().ok())
        .unwrap_or(0.0)
}

pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_string()
}

pub fn hostname() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname")
        .unwrap_or_default()
        .trim()
        .to_string()
}

fn own_rss() -> i64 {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    meminfo(&text, "VmRSS")
}

pub fn snapshot(running_jobs: usize) -> Value {
    let mem = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let vmstat = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let words: Vec<&str> = load.split_ascii_whitespace().collect();
    let load_at = |i: usize| {
        words
            .get(i)
            .and_then(|w| w.parse::<f64>().ok())
            .unwrap_or(0.0)
    };
    let processes = words
        .get(3)
        .and_then(|w| w.split('/').nth(1)?.parse::<i64>().ok())
        .unwrap_or(0);
    obj([
        ("memory_total_bytes", meminfo(&mem, "MemTotal").into()),
        ("memory_free_bytes", meminfo(&mem, "MemFree").into()),
        (
            "memory_available_bytes",
            meminfo(&mem, "MemAvailable").into(),
        ),
        ("page_cache_bytes", meminfo(&mem, "Cached").into()),
        ("anonymous_bytes", meminfo(&mem, "AnonPages").into()),
        ("load1", load_at(0).into()),
        ("load5", load_at(1).into()),
        ("load15", load_at(2).into()),
        ("threads", processes.into()),
        ("uptime_s", uptime_s().into()),
        ("jobs_running", (running_jobs as i64).into()),
        ("oom_kills", oom_kills(&vmstat).into()),
        ("guestd_rss_bytes", own_rss().into()),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields() {
        let text = "MemTotal:  100 kB\nMemFree: 7 kB\n";
        assert_eq!(
            (
                meminfo(text, "MemTotal"),
                meminfo(text, "MemFree"),
                meminfo(text, "Mem")
            ),
            (102_400, 7168, 0)
        );
        assert_eq!(oom_kills("oom_kil 9\npgfault 1\noom_kill 3\n"), 3);
        assert_eq!(oom_kills(""), 0);
        assert!(uptime_s() > 0.0);
        assert!(
            snapshot(1)
                .get("memory_total_bytes")
                .unwrap()
                .as_int()
                .unwrap()
                > 0
        );
    }
}

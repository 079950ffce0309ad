//! The rate of the host's time stamp counter, measured: a microvm guest has no clock to calibrate its own against.
//!
//! Measured and not read from CPUID, because what a guest sees under emulation is this counter as it is, and CPUID's
//! figure is absent on many hosts and wrong on some. The error is the time of a clock reading (~50 ns) in 30 ms.

use crate::sys;

const SAMPLE_NS: u64 = 10_000_000;

fn counter() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// The counter and the clock at the same moment: the reading with the shortest gap of several.
fn moment() -> (u64, u64) {
    let read = || {
        let before = counter();
        let clock = sys::clock_ns(libc::CLOCK_MONOTONIC_RAW);
        let after = counter();
        (after - before, before + (after - before) / 2, clock)
    };
    let best = (0..8).map(|_| read()).min_by_key(|(gap, _, _)| *gap);
    best.map_or((0, 0), |(_, ticks, clock)| (ticks, clock))
}

fn sample() -> u64 {
    let (ticks, clock) = moment();
    while sys::clock_ns(libc::CLOCK_MONOTONIC_RAW) - clock < SAMPLE_NS {
        std::hint::spin_loop();
    }
    let (ticks_later, clock_later) = moment();
    (ticks_later - ticks) * 1_000_000 / (clock_later - clock)
}

/// Kilohertz, the median of three samples.
pub fn khz() -> u64 {
    let mut samples = [sample(), sample(), sample()];
    samples.sort_unstable();
    samples[1]
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_measurements_agree() {
        let (a, b) = (super::khz(), super::khz());
        assert!(a > 100_000, "{a}");
        assert!(a.abs_diff(b) * 1000 < a, "{a} {b}");
    }
}

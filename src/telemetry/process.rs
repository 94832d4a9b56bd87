//! This process as the kernel sees it: `/proc/self` (proc(5)). All zero where there is no procfs.

/// What the kernel says of this process.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ProcessStats {
    /// Resident memory in bytes.
    pub resident_bytes: u64,
    /// Address space in bytes.
    pub virtual_bytes: u64,
    /// Processor time used, user and system, in seconds.
    pub cpu_s: f64,
    /// Open file descriptors.
    pub open_fds: u64,
    /// Threads.
    pub threads: u64,
}

/// Clock ticks a second in `/proc/self/stat`: `USER_HZ`, which is 100 on every Linux architecture that Rust targets.
const TICKS_PER_S: f64 = 100.0;

/// Reads the present figures. Blocks for microseconds.
pub fn read() -> ProcessStats {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    ProcessStats {
        resident_bytes: status_field(&status, "VmRSS:") * 1024,
        virtual_bytes: status_field(&status, "VmSize:") * 1024,
        cpu_s: cpu_ticks(&stat) as f64 / TICKS_PER_S,
        open_fds: std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64),
        threads: status_field(&status, "Threads:"),
    }
}

/// A number in `/proc/self/status`; those of memory are in KiB.
fn status_field(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    value.and_then(|value| value.split_ascii_whitespace().next()).and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// `utime` and `stime`, fields 14 and 15. Field 2 is the program's name in brackets, which may itself hold blanks and
/// brackets, so counting starts behind the last bracket.
fn cpu_ticks(text: &str) -> u64 {
    let rest = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<u64> = rest.split_ascii_whitespace().map(|field| field.parse().unwrap_or(0)).collect();
    let field = |number: usize| fields.get(number - 3).copied().unwrap_or(0);
    field(14) + field(15)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_shift_the_fields() {
        assert_eq!(cpu_ticks("7 (a (b) c) S 1 2 3 4 5 6 7 8 9 10 140 2 0 0 20 0 11 0 5"), 142);
        assert_eq!(cpu_ticks(""), 0);
        assert_eq!(status_field("Name:\tx\nVmRSS:\t    20 kB\n", "VmRSS:"), 20);
    }

    #[test]
    fn this_process_uses_memory() {
        let stats = read();
        assert!(stats.resident_bytes > 1 << 20, "{stats:?}");
        assert!(stats.open_fds > 2 && stats.threads >= 1, "{stats:?}");
    }
}

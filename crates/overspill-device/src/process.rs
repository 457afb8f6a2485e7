//! Memory of this process, where RAM is the device tier.

/// A tensor of this size or more gets pages of its own, which leave the process when it is freed.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const OWN_PAGES_FROM_BYTES: libc::c_int = 256 << 10;

/// What the operating system says of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessMemory {
    /// Anonymous memory that is resident: heap and tensors, not mapped files.
    pub anonymous_bytes: u64,
    /// All that is resident.
    pub resident_bytes: u64,
}

/// Reads `/proc/self/statm`; `None` where there is none.
#[must_use]
pub fn process_memory() -> Option<ProcessMemory> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let mut pages = statm.split_ascii_whitespace().skip(1).map(str::parse::<u64>);
    let (resident, shared) = (pages.next()?.ok()?, pages.next()?.ok()?);
    let page_bytes = rustix::param::page_size() as u64;
    Some(ProcessMemory {
        anonymous_bytes: resident.saturating_sub(shared) * page_bytes,
        resident_bytes: resident * page_bytes,
    })
}

/// Most bytes that were ever resident (`VmHWM`); `None` where the system does not say.
#[must_use]
pub fn resident_peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Makes malloc give freed tensors back to the operating system at once. Otherwise it keeps blocks
/// of up to 32 MiB for itself, and what a budget on RAM gave up would still be held.
pub fn return_freed_tensors() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt has no preconditions; an option that it does not know is ignored.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_PAGES_FROM_BYTES);
    }
}

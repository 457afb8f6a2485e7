//! What the operating system and the allocator say of this process.

/// Bytes that malloc has handed out and not got back, the mapped ones included: what PyTorch's CPU
/// tensors take. glibc only; 0 elsewhere.
#[must_use]
pub fn malloc_bytes_in_use() -> u64 {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: mallinfo2 has no preconditions; it takes the allocator's own locks.
        let info = unsafe { libc::mallinfo2() };
        info.uordblks as u64 + info.hblkhd as u64
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    0
}

//! Page-locked host memory, two ways, and what is left when neither works.
//!
//! *Registered*: memory mapped on huge pages, touched by many threads, then registered; huge pages
//! are what lets a copy engine run at the link's speed, and the touching is what takes the time.
//! *Allocated*: `cuMemHostAlloc`, one thread of the driver's. *Pageable*: neither was granted (a
//! limit on locked memory, WSL2's cap): copies work, slower, and the counters say how much of the
//! memory is of that kind. Everything is returned when the last lease on it is dropped.

use std::{
    ffi::c_void,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use cudarc::driver::sys;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use super::driver::{Context, check};
use crate::{Error, HostSlab, Result};

const HUGE_PAGE_BYTES: usize = 2 << 20;
const SMALL_PAGE_BYTES: usize = 4 << 10;
/// More threads than this do not fault pages in faster.
const MOST_THREADS: usize = 16;

/// How host memory is page-locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HostMemory {
    /// Mapped on huge pages, touched by many threads, registered.
    Registered,
    /// Allocated by the driver.
    Allocated,
    /// Not page-locked at all.
    Pageable,
}

impl HostMemory {
    /// The faster kind here: registered memory copies at full speed only on huge pages.
    #[must_use]
    pub fn best() -> Self {
        if huge_pages_possible() { Self::Registered } else { Self::Allocated }
    }

    /// What to try when this kind is refused.
    fn next(self) -> Option<Self> {
        match self {
            Self::Registered => Some(Self::Allocated),
            Self::Allocated => Some(Self::Pageable),
            Self::Pageable => None,
        }
    }
}

/// Whether a mapping can get huge pages: reserved ones, or transparent ones on request.
#[must_use]
pub fn huge_pages_possible() -> bool {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let transparent = read("/sys/kernel/mm/transparent_hugepage/enabled");
    let reserved = read("/proc/sys/vm/nr_hugepages");
    transparent.contains("[always]")
        || transparent.contains("[madvise]")
        || reserved.trim().parse::<u64>().is_ok_and(|pages| pages > 0)
}

/// Bytes of host memory held now, by kind.
#[derive(Debug, Default)]
pub struct HostCounters {
    bytes: [AtomicUsize; 3],
}

impl HostCounters {
    fn of(&self, kind: HostMemory) -> &AtomicUsize {
        &self.bytes[kind as usize]
    }

    /// Bytes held of one kind.
    #[must_use]
    pub fn bytes(&self, kind: HostMemory) -> usize {
        self.of(kind).load(Ordering::Relaxed)
    }
}

/// One allocation.
struct Block {
    context: Arc<Context>,
    counters: Arc<HostCounters>,
    kind: HostMemory,
    addr: usize,
    bytes: usize,
}

/// A slab of at least one byte, of the kind wanted or the next that is granted.
pub fn alloc(
    context: &Arc<Context>,
    counters: &Arc<HostCounters>,
    wanted: HostMemory,
    bytes: usize,
) -> Result<HostSlab> {
    let mut kind = wanted;
    let block = loop {
        match Block::new(context, counters, kind, bytes.max(1)) {
            Ok(block) => break block,
            Err(error) => kind = kind.next().ok_or(error)?,
        }
    };
    let addr = block.addr as u64;
    // SAFETY: zeroed memory of our own that lives as long as the block.
    Ok(unsafe { HostSlab::from_raw(addr, bytes, Arc::new(block), None) })
}

impl Block {
    fn new(
        context: &Arc<Context>,
        counters: &Arc<HostCounters>,
        kind: HostMemory,
        bytes: usize,
    ) -> Result<Self> {
        let addr = match kind {
            HostMemory::Registered => register(context, bytes)?,
            HostMemory::Allocated => allocate(context, bytes)?,
            HostMemory::Pageable => map(bytes)?,
        };
        counters.of(kind).fetch_add(bytes, Ordering::Relaxed);
        Ok(Self { context: Arc::clone(context), counters: Arc::clone(counters), kind, addr, bytes })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let start = pointer(self.addr);
        let entered = self.context.enter();
        match self.kind {
            HostMemory::Registered => {
                // SAFETY: registered in `register`. At interpreter exit the driver may be gone, and
                // its registrations with it: unmapping is right either way.
                let _ = unsafe { sys::cuMemHostUnregister(start) };
                unmap(self.addr, self.bytes);
            }
            HostMemory::Allocated => {
                // SAFETY: allocated in `allocate`, freed once.
                let _ = unsafe { sys::cuMemFreeHost(start) };
            }
            HostMemory::Pageable => unmap(self.addr, self.bytes),
        }
        drop(entered);
        self.counters.of(self.kind).fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

fn register(context: &Context, bytes: usize) -> Result<usize> {
    let addr = map(bytes)?;
    let registered = context.enter().and_then(|_entered| {
        // Portable: page-locked for every context of the process.
        // SAFETY: the range is mapped, and unregistered before it is unmapped.
        let asked = unsafe {
            sys::cuMemHostRegister_v2(pointer(addr), mapped_bytes(bytes), sys::CU_MEMHOSTREGISTER_PORTABLE)
        };
        check("cuMemHostRegister", asked)
    });
    if registered.is_err() {
        unmap(addr, bytes);
    }
    registered.map(|()| addr)
}

fn allocate(context: &Context, bytes: usize) -> Result<usize> {
    let _entered = context.enter()?;
    let mut start: *mut c_void = std::ptr::null_mut();
    // SAFETY: the context is current; freed once, in `drop`.
    let asked = unsafe { sys::cuMemHostAlloc(&raw mut start, bytes, sys::CU_MEMHOSTALLOC_PORTABLE) };
    check("cuMemHostAlloc", asked)?;
    let addr = start.expose_provenance();
    in_parallel(bytes, |offset, length| {
        // The driver does not promise zeroes, and the slab promises initialised bytes.
        // SAFETY: the pieces are disjoint parts of the allocation.
        unsafe { pointer(addr + offset).cast::<u8>().write_bytes(0, length) };
    });
    Ok(addr)
}

/// Maps and faults in zeroed memory, on huge pages where the system has them.
fn map(bytes: usize) -> Result<usize> {
    let mapped = mapped_bytes(bytes);
    // What is left is not asked: a virtual machine whose memory grows as it is used says too little.
    let refused = |_| Error::OutOfMemory { tier: "host", requested_bytes: bytes, available_bytes: 0 };
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE;
    // SAFETY: a new anonymous mapping at an address of the system's choice.
    let reserved =
        unsafe { mmap_anonymous(std::ptr::null_mut(), mapped, protection, flags | MapFlags::HUGETLB) };
    let start = match reserved {
        Ok(start) => start,
        Err(_) => {
            // SAFETY: as above.
            let start = unsafe { mmap_anonymous(std::ptr::null_mut(), mapped, protection, flags) }
                .map_err(refused)?;
            // Refused where transparent huge pages are off: small pages then, slower to copy.
            // SAFETY: the range is the mapping just made.
            let _ = unsafe { madvise(start, mapped, Advice::LinuxHugepage) };
            start
        }
    };
    // A fork would make the pages copy-on-write, and the next write of this process move them away
    // from the copy engine.
    // SAFETY: the range is the mapping just made.
    let _ = unsafe { madvise(start, mapped, Advice::LinuxDontFork) };
    let addr = start.expose_provenance();
    in_parallel(mapped, |offset, length| {
        for page in (offset..offset + length).step_by(SMALL_PAGE_BYTES) {
            // SAFETY: inside the mapping; volatile, since nobody reads the zero back.
            unsafe { pointer(addr + page).cast::<u8>().write_volatile(0) };
        }
    });
    Ok(addr)
}

fn unmap(addr: usize, bytes: usize) {
    // SAFETY: mapped by `map` for the same number of bytes, and leased by nobody any more.
    let _ = unsafe { munmap(pointer(addr), mapped_bytes(bytes)) };
}

/// Saturates, so that a size that cannot be is refused by the system.
fn mapped_bytes(bytes: usize) -> usize {
    bytes.checked_next_multiple_of(HUGE_PAGE_BYTES).unwrap_or(usize::MAX)
}

fn pointer(addr: usize) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(addr)
}

/// Runs `work(offset, length)` over pieces of `bytes`, on as many threads as help.
fn in_parallel(bytes: usize, work: impl Fn(usize, usize) + Sync) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
    let piece = bytes.div_ceil(threads).next_multiple_of(HUGE_PAGE_BYTES);
    let work = &work;
    std::thread::scope(|scope| {
        for offset in (0..bytes).step_by(piece) {
            scope.spawn(move || work(offset, piece.min(bytes - offset)));
        }
    });
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn every_byte_is_in_one_piece() {
        for bytes in [1, HUGE_PAGE_BYTES - 1, HUGE_PAGE_BYTES, 7 * HUGE_PAGE_BYTES + 5, 100 * HUGE_PAGE_BYTES]
        {
            let pieces = Mutex::new(Vec::new());
            in_parallel(bytes, |offset, length| pieces.lock().expect("pieces").push((offset, length)));
            let mut pieces = pieces.into_inner().expect("pieces");
            pieces.sort_unstable();
            let end = pieces.iter().fold(0, |end, &(offset, length)| {
                assert_eq!(offset, end, "{bytes} bytes");
                offset + length
            });
            assert_eq!(end, bytes);
            assert!(pieces.len() <= MOST_THREADS, "{bytes} bytes");
        }
    }

    #[test]
    fn mapped_memory_is_zeroed_writable_and_can_be_given_back() {
        for bytes in [1, SMALL_PAGE_BYTES, HUGE_PAGE_BYTES + 1] {
            let addr = map(bytes).expect("mapped");
            // SAFETY: just mapped for at least as many bytes, and not unmapped before the last use.
            let memory = unsafe { std::slice::from_raw_parts_mut(pointer(addr).cast::<u8>(), bytes) };
            assert!(memory.iter().all(|&byte| byte == 0));
            memory.fill(1);
            unmap(addr, bytes);
        }
        let refused = map(1 << 60).expect_err("more than an address space");
        assert_eq!(
            refused,
            Error::OutOfMemory { tier: "host", requested_bytes: 1 << 60, available_bytes: 0 }
        );
        assert!(map(usize::MAX).is_err());
    }
}

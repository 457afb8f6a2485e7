//! Memory of the simulated device: page-aligned, poisoned when freed under a seeded schedule.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    sync::Arc,
};

use crate::{DeviceRange, Error, HostSlab, Result};

const PAGE_BYTES: usize = 4096;
/// Fills freed device memory: 0xDD repeated is a bf16 of about -2e18 and an improbable integer.
const DEVICE_POISON: u8 = 0xDD;
/// Fills host extents that came back.
const HOST_POISON: u8 = 0xDB;

/// An allocation. A quarantined one is poisoned instead of freed, so that a late reader sees
/// poison; tests are short-lived and small.
struct Block {
    addr: usize,
    layout: Layout,
    quarantine: bool,
}

impl Block {
    fn new(bytes: usize, tier: &'static str, quarantine: bool) -> Result<Self> {
        let refused = || Error::OutOfMemory { tier, requested_bytes: bytes, available_bytes: 0 };
        let layout = Layout::from_size_align(bytes.max(1), PAGE_BYTES).map_err(|_| refused())?;
        // SAFETY: the layout has a size of at least 1.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() { Err(refused()) } else { Ok(Self { addr: start.addr(), layout, quarantine }) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let start = std::ptr::with_exposed_provenance_mut::<u8>(self.addr);
        if self.quarantine {
            // SAFETY: the block is still allocated, and nobody has a lease on it any more.
            unsafe { start.write_bytes(DEVICE_POISON, self.layout.size()) };
        } else {
            // SAFETY: allocated in `new` with this layout, and freed once.
            unsafe { dealloc(start, self.layout) };
        }
    }
}

pub fn alloc_device(bytes: usize, quarantine: bool) -> Result<DeviceRange> {
    let block = Block::new(bytes, "device", quarantine)?;
    let addr = block.addr as u64;
    // SAFETY: the block holds `bytes` at `addr` until it is dropped.
    Ok(unsafe { DeviceRange::from_raw(addr, bytes, Arc::new(block)) })
}

pub fn alloc_host(bytes: usize, poison: bool) -> Result<HostSlab> {
    let block = Block::new(bytes, "host", poison)?;
    let addr = block.addr as u64;
    let fill = |addr: u64, bytes: usize| {
        let start = std::ptr::with_exposed_provenance_mut::<u8>(addr as usize);
        // SAFETY: the slab passes a range of its own that has no owner now.
        unsafe { start.write_bytes(HOST_POISON, bytes) };
    };
    let on_return: Option<Box<dyn Fn(u64, usize) + Send + Sync>> =
        if poison { Some(Box::new(fill)) } else { None };
    // SAFETY: zeroed memory of our own that lives as long as the block.
    Ok(unsafe { HostSlab::from_raw(addr, bytes, Arc::new(block), on_return) })
}

pub fn read(range: &DeviceRange) -> Vec<u8> {
    let start = std::ptr::with_exposed_provenance::<u8>(range.addr() as usize);
    // SAFETY: the lease keeps the range allocated; it is zeroed at allocation, so initialised.
    unsafe { std::slice::from_raw_parts(start, range.bytes()) }.to_vec()
}

pub fn write(range: &DeviceRange, bytes: &[u8]) {
    assert_eq!(range.bytes(), bytes.len(), "lengths differ");
    let start = std::ptr::with_exposed_provenance_mut::<u8>(range.addr() as usize);
    // SAFETY: the lease keeps the range allocated, and it does not overlap a slice of Rust's.
    unsafe { start.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
}

/// Copies between two leased ranges.
///
/// # Safety
/// As `Stream::copy` states for its batch.
pub unsafe fn copy(copy: &crate::RawCopy) {
    let from = std::ptr::with_exposed_provenance::<u8>(copy.src_addr as usize);
    let to = std::ptr::with_exposed_provenance_mut::<u8>(copy.dst_addr as usize);
    // SAFETY: both ranges are mapped and distinct allocations, by the caller's promise.
    unsafe { to.copy_from_nonoverlapping(from, copy.bytes) };
}

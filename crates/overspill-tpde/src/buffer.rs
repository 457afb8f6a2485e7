//! Scratch memory of workers, in huge pages where the system has them.
//!
//! Fresh memory costs a page fault every 4 KiB: on a virtual machine of 2 cores that is 1.2 GB/s a core, less than
//! decoding. So buffers are kept from job to job and ask for large pages; a system without them ignores that.

use memmap2::{Advice, MmapMut};

use crate::{Error, Result};

/// Size of a huge page, and from where on one is asked for.
const HUGE_BYTES: usize = 2 << 20;

/// Memory that grows and is then kept.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    map: Option<MmapMut>,
}

impl Buffer {
    /// The first `bytes` bytes, with any content.
    pub fn room(&mut self, bytes: usize) -> Result<&mut [u8]> {
        if self.map.as_ref().map_or(0, |map| map.len()) < bytes {
            // The old memory goes first: the budget counts one of them.
            self.map = None;
            let rounded = if bytes < HUGE_BYTES { bytes } else { bytes.next_multiple_of(HUGE_BYTES) };
            let map = MmapMut::map_anon(rounded).map_err(Error::io("scratch memory".as_ref(), "reserve"))?;
            let _ = map.advise(Advice::HugePage);
            self.map = Some(map);
        }
        Ok(self.map.as_deref_mut().map_or(&mut [], |map| &mut map[..bytes]))
    }
}

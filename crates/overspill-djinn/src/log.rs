//! What moved, when, and how fast: one entry a swap, timed on the device's clock.
//!
//! Kept only while somebody asked for it ([`crate::Pool::log_swaps`]). Copies are timed by an event before and
//! one behind each batch, after the batch's own waits: what is measured is the copy, not what it waited for.

use std::sync::Arc;

use overspill_device::{EventRef, StreamRef};
use serde::Serialize;

use crate::Result;

/// Why bytes moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// To the host copy, while the session was on the device.
    WriteThrough,
    /// To the host copy, because it had to be whole: the session leaves, or is forked or saved.
    Evict,
    /// Back to the device.
    Restore,
    /// To disk.
    Spill,
    /// From disk.
    Unspill,
}

/// One swap.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Swap {
    /// The session.
    pub id: u64,
    /// Why.
    pub cause: Cause,
    /// Bytes moved; 0 where a clean session left.
    pub bytes: usize,
    /// When the first copy began, in microseconds since the device was opened.
    pub start_us: f64,
    /// Time that copies took.
    pub copy_us: f64,
    /// From the first copy's begin to the last one's end, waits between them included.
    pub span_us: f64,
}

/// A swap whose copies may still run.
pub(crate) struct Pending {
    pub id: u64,
    pub cause: Cause,
    pub bytes: usize,
    pub batches: Vec<(EventRef, EventRef)>,
}

impl Pending {
    /// Notes a batch that began at `begin` and has been enqueued.
    pub fn add(&mut self, begin: Option<EventRef>, end: &EventRef, bytes: usize) {
        self.bytes += bytes;
        self.batches.extend(begin.map(|begin| (begin, Arc::clone(end))));
    }

    fn close(self) -> Result<Swap> {
        let mut swap = Swap {
            id: self.id,
            cause: self.cause,
            bytes: self.bytes,
            start_us: 0.0,
            copy_us: 0.0,
            span_us: 0.0,
        };
        for (index, (begin, end)) in self.batches.iter().enumerate() {
            end.synchronize()?;
            let (begin_us, end_us) = (begin.time_us()?, end.time_us()?);
            if index == 0 {
                swap.start_us = begin_us;
            }
            swap.copy_us += end_us - begin_us;
            swap.span_us = end_us - swap.start_us;
        }
        Ok(swap)
    }
}

/// The log; empty and without cost until it is opened.
#[derive(Default)]
pub(crate) struct SwapLog {
    open: bool,
    pending: Vec<Pending>,
    closed: Vec<Swap>,
}

impl SwapLog {
    pub fn set_open(&mut self, open: bool) {
        self.open = open;
    }

    /// The point of `stream` at which a batch begins.
    pub fn mark(&self, stream: &StreamRef) -> Result<Option<EventRef>> {
        Ok(if self.open { Some(stream.record()?) } else { None })
    }

    /// Enters a swap whose copies have been enqueued.
    pub fn enter(&mut self, pending: Pending) {
        if self.open {
            self.pending.push(pending);
        }
    }

    /// Enters one that is over.
    pub fn note(&mut self, id: u64, cause: Cause, bytes: usize, start_us: f64, end_us: f64) {
        if self.open {
            let took_us = end_us - start_us;
            self.closed.push(Swap { id, cause, bytes, start_us, copy_us: took_us, span_us: took_us });
        }
    }

    /// All entries so far, in the order in which they began; waits for copies that still run.
    pub fn take(&mut self) -> Result<Vec<Swap>> {
        let mut swaps = std::mem::take(&mut self.closed);
        for pending in self.pending.drain(..) {
            swaps.push(pending.close()?);
        }
        swaps.sort_by(|a, b| a.start_us.total_cmp(&b.start_us));
        Ok(swaps)
    }
}

//! Host extents that fill from their start on.
//!
//! A [`HostTape`] is the host copy of something that only grows. What is filled is never written
//! again, so that its readers and its appenders never touch the same byte: a reader waits for the
//! event of the last append and for nothing else. One owner appends at a time.

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    DeviceRange, Direction, Error, EventRef, HostExtent, InFlight, Keep, RawCopy, Result, StreamRef,
    inflight::send,
};

/// See the module.
#[derive(Debug)]
pub struct HostTape {
    extent: HostExtent,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    filled_bytes: usize,
    /// Handed to an append that has not been enqueued yet.
    reserved_bytes: usize,
    /// Of the last append, while that may still run.
    event: Option<EventRef>,
}

impl HostTape {
    /// An empty tape over `extent`.
    #[must_use]
    pub fn new(extent: HostExtent) -> Self {
        Self { extent, state: Mutex::default() }
    }

    /// Bytes that it can hold.
    #[must_use]
    pub fn capacity_bytes(&self) -> usize {
        self.extent.bytes()
    }

    /// Bytes that were appended so far.
    #[must_use]
    pub fn filled_bytes(&self) -> usize {
        self.state().filled_bytes
    }

    /// The first `bytes`, after the copies that fill them have passed; blocks until then.
    pub fn as_slice(&self, bytes: usize) -> Result<&[u8]> {
        let (filled_bytes, event) = self.filled();
        check(0..bytes, filled_bytes, "not filled")?;
        if let Some(event) = event {
            event.synchronize()?;
        }
        // SAFETY: the extent keeps the memory mapped and initialised and is ours alone; nothing
        // writes below `filled_bytes` once the last append has passed, which was waited for.
        Ok(unsafe { std::slice::from_raw_parts(self.extent.addr() as *const u8, bytes) })
    }

    /// Appends `bytes` that the host writes; on an error of `fill` the tape is as it was.
    pub fn append_host<E: From<Error>>(
        &self,
        bytes: usize,
        fill: impl FnOnce(&mut [u8]) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let range = self.reserve(bytes)?;
        // SAFETY: as in `as_slice`; the range is reserved, so that nobody else writes it, and above
        // `filled_bytes`, so that nobody reads it.
        let free = unsafe {
            std::slice::from_raw_parts_mut((self.extent.addr() + range.start as u64) as *mut u8, bytes)
        };
        let outcome = fill(free);
        self.settle(range, outcome.is_ok(), None);
        outcome
    }

    fn reserve(&self, bytes: usize) -> Result<Range<usize>> {
        let mut state = self.state();
        let range = state.reserved_bytes..state.reserved_bytes.saturating_add(bytes);
        check(range.clone(), self.extent.bytes(), "beyond the end of the tape")?;
        if state.reserved_bytes != state.filled_bytes {
            return Err(bad_range(range, self.extent.bytes(), "being appended to already"));
        }
        state.reserved_bytes = range.end;
        Ok(range)
    }

    fn settle(&self, range: Range<usize>, filled: bool, event: Option<EventRef>) {
        let mut state = self.state();
        if filled {
            state.filled_bytes = range.end;
            // Appends of one tape go in order, so the last event covers those before it.
            state.event = event.or_else(|| state.event.take());
        } else {
            state.reserved_bytes = range.start;
        }
    }

    fn filled(&self) -> (usize, Option<EventRef>) {
        let state = self.state();
        (state.filled_bytes, state.event.clone())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Appends each device range to its tape. The caller has made `stream` wait for the point from which
/// the ranges may be read; all appends of one tape go through one stream.
pub fn append(stream: &StreamRef, parts: Vec<(DeviceRange, Arc<HostTape>)>) -> Result<InFlight> {
    let mut reserved: Vec<Range<usize>> = Vec::with_capacity(parts.len());
    for (range, tape) in &parts {
        match tape.reserve(range.bytes()) {
            Ok(at) => reserved.push(at),
            Err(error) => {
                for ((_, tape), at) in parts.iter().zip(reserved) {
                    tape.settle(at, false, None);
                }
                return Err(error);
            }
        }
    }
    let batch = parts.iter().zip(&reserved).map(|((range, tape), at)| RawCopy {
        direction: Direction::Offload,
        src_addr: range.addr(),
        dst_addr: tape.extent.addr() + at.start as u64,
        bytes: range.bytes(),
    });
    let batch = joined(batch);
    let tapes: Vec<_> = parts.iter().map(|(_, tape)| Arc::clone(tape)).collect();
    let leases = parts.into_iter().map(|(range, tape)| (range, tape as Keep)).collect();
    // SAFETY: the InFlight holds ranges and tapes until the event has passed; the destination is
    // reserved, so nobody else writes it, and is read only behind the event set below.
    let sent = unsafe { send(stream, &batch, leases) };
    for (tape, at) in tapes.iter().zip(reserved) {
        tape.settle(at, sent.is_ok(), sent.as_ref().ok().map(|sent| Arc::clone(sent.event())));
    }
    sent
}

/// Copies parts of tapes into device ranges of the same lengths, behind whatever still fills them.
/// The caller has made `stream` wait for the point from which the destinations may be written.
pub fn play(stream: &StreamRef, parts: Vec<(DeviceRange, Arc<HostTape>, Range<usize>)>) -> Result<InFlight> {
    let mut batch = Vec::with_capacity(parts.len());
    let mut waited: Vec<EventRef> = Vec::new();
    for (range, tape, from) in &parts {
        let (filled_bytes, event) = tape.filled();
        check(from.clone(), filled_bytes, "not filled")?;
        if from.len() != range.bytes() {
            return Err(Error::SizeMismatch { src_bytes: from.len(), dst_bytes: range.bytes() });
        }
        if let Some(event) = event.filter(|event| !waited.iter().any(|seen| Arc::ptr_eq(seen, event))) {
            stream.wait(&event)?;
            waited.push(event);
        }
        batch.push(RawCopy {
            direction: Direction::Onboard,
            src_addr: tape.extent.addr() + from.start as u64,
            dst_addr: range.addr(),
            bytes: range.bytes(),
        });
    }
    let batch = joined(batch.into_iter());
    let leases = parts.into_iter().map(|(range, tape, _)| (range, tape as Keep)).collect();
    // SAFETY: the InFlight holds ranges and tapes until the event has passed; the source is filled
    // behind the waits above and never written again; the destination is the caller's promise.
    unsafe { send(stream, &batch, leases) }
}

/// Neighbours on both sides become one copy: a copy engine is slow on small ones.
fn joined(copies: impl Iterator<Item = RawCopy>) -> Vec<RawCopy> {
    let mut batch: Vec<RawCopy> = Vec::new();
    for copy in copies.filter(|copy| copy.bytes > 0) {
        match batch.last_mut() {
            Some(last)
                if last.src_addr + last.bytes as u64 == copy.src_addr
                    && last.dst_addr + last.bytes as u64 == copy.dst_addr =>
            {
                last.bytes += copy.bytes;
            }
            _ => batch.push(copy),
        }
    }
    batch
}

fn check(range: Range<usize>, bytes: usize, what: &'static str) -> Result<()> {
    if range.start <= range.end && range.end <= bytes { Ok(()) } else { Err(bad_range(range, bytes, what)) }
}

fn bad_range(range: Range<usize>, bytes: usize, what: &'static str) -> Error {
    Error::BadRange { start: range.start, end: range.end, bytes, what }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, sim::SimDevice};

    fn tape(device: &SimDevice, bytes: usize) -> Arc<HostTape> {
        let slab = device.alloc_host(bytes).expect("host memory");
        Arc::new(HostTape::new(slab.claim(0..bytes).expect("free")))
    }

    #[test]
    fn appended_pieces_play_back_as_one_run() {
        let device = SimDevice::threads();
        let (out, back) =
            (device.new_stream("offload").expect("out"), device.new_stream("onboard").expect("in"));
        let source = device.alloc_device(300).expect("device memory");
        let content: Vec<u8> = (0..300).map(|i| i as u8).collect();
        device.write(&source, &content);
        let tape = tape(&device, 400);
        let mut sent = Vec::new();
        for piece in [0..100, 100..101, 101..300] {
            let range = source.slice(piece).expect("in bounds");
            sent.push(append(&out, vec![(range, Arc::clone(&tape))]).expect("room"));
        }
        let target = device.alloc_device(200).expect("device memory");
        play(&back, vec![(target.clone(), Arc::clone(&tape), 50..250)])
            .expect("filled")
            .event()
            .synchronize()
            .expect("done");
        assert_eq!(device.read(&target), content[50..250]);
        assert_eq!(tape.as_slice(300).expect("filled"), &content[..]);
        tape.append_host(100, |free| {
            free.fill(7);
            Ok::<(), Error>(())
        })
        .expect("room");
        assert_eq!(tape.as_slice(400).expect("filled")[300..], [7; 100]);
    }

    #[test]
    fn what_is_not_there_is_refused_and_changes_nothing() {
        let device = SimDevice::threads();
        let stream = device.new_stream("offload").expect("stream");
        let (small, large) = (tape(&device, 10), tape(&device, 100));
        let range = device.alloc_device(20).expect("device memory");
        append(&stream, vec![(range.clone(), Arc::clone(&large)), (range.clone(), small)])
            .expect_err("too long");
        assert_eq!(large.filled_bytes(), 0);
        play(&stream, vec![(range.clone(), Arc::clone(&large), 0..20)]).expect_err("not filled");
        drop(append(&stream, vec![(range, Arc::clone(&large))]).expect("still free"));
        large.as_slice(21).expect_err("not filled");
        large.append_host(5, |_| Err(Error::Injected("no"))).expect_err("injected");
        assert_eq!(large.filled_bytes(), 20);
    }

    #[test]
    fn neighbours_are_joined() {
        let copy =
            |src_addr, dst_addr, bytes| RawCopy { direction: Direction::Offload, src_addr, dst_addr, bytes };
        let batch =
            joined([copy(0, 100, 10), copy(10, 110, 5), copy(15, 120, 5), copy(20, 125, 0)].into_iter());
        assert_eq!(batch.iter().map(|copy| copy.bytes).collect::<Vec<_>>(), [15, 5]);
    }
}

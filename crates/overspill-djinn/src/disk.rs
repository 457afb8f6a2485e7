//! Moving sessions: host copy to disk and back.
//!
//! A piece of a host copy is let go of only when it is on disk, and its extent there only when it is in host
//! memory again: a move that fails half way leaves a session whole, partly here and partly there. Large copies
//! go over several threads, since a disk that is asked for one piece at a time waits, and each is hashed besides.
//! Whoever moves a session waits for it; what the device computes meanwhile does not.

use std::{panic::resume_unwind, sync::Arc, thread};

use overspill_device::HostTape;
use overspill_engine::{self as engine, SpillFile, Tier};

use crate::{
    Error, Pool, Result,
    host_copy::{Piece, Place},
    log::Cause,
};

/// Pieces that are written or read at once.
const LANES: usize = 4;
/// Smaller moves are not worth a thread.
const LANE_BYTES: usize = 16 << 20;

impl Pool {
    /// Writes the host copy of a session to disk and gives back its host memory. A write that fails
    /// leaves the rest in host memory.
    pub fn spill(&mut self, id: u64) -> Result<()> {
        let outcome = self.write_out(id);
        self.count(id)?;
        self.reap()?;
        outcome
    }

    fn write_out(&mut self, id: u64) -> Result<()> {
        let Some(file) = self.spill.clone() else { return Err(self.no_disk(id)?) };
        let begun_us = self.device.now_us();
        let entry = self.sessions.get_mut(&id).ok_or(Error::Unknown { id })?;
        let before_bytes = entry.copy.host_bytes();
        let pieces = entry.copy.pieces_mut().filter(|piece| piece.bytes > 0 && !piece.is_on_disk()).collect();
        let outcome = in_lanes(pieces, before_bytes, |piece| write(&file, piece));
        let bytes = before_bytes - entry.copy.host_bytes();
        self.counters.spilled_bytes += bytes as u64;
        self.log.note(id, Cause::Spill, bytes, begun_us, self.device.now_us());
        outcome
    }

    /// Reads what of a session is on disk into host memory. A read that fails leaves it on disk.
    pub fn unspill(&mut self, id: u64) -> Result<()> {
        if self.entry(id)?.copy.disk_bytes() == 0 {
            return Ok(());
        }
        let outcome = self.read_in(id);
        self.count(id)?;
        outcome
    }

    fn read_in(&mut self, id: u64) -> Result<()> {
        let begun_us = self.device.now_us();
        let extents: Vec<usize> =
            self.entry(id)?.copy.pieces_mut().filter_map(|piece| piece.extent_bytes()).collect();
        let mut tapes = Vec::with_capacity(extents.len());
        for bytes in extents {
            tapes.push(HostTape::new(self.host_extent(bytes, id, true)?));
        }
        let entry = self.entry(id)?;
        let before_bytes = entry.copy.disk_bytes();
        let pieces = entry.copy.pieces_mut().filter(|piece| piece.is_on_disk()).zip(tapes).collect();
        let outcome = in_lanes(pieces, before_bytes, |(piece, tape)| read(piece, tape));
        let bytes = before_bytes - entry.copy.disk_bytes();
        self.counters.unspilled_bytes += bytes as u64;
        if bytes > 0 {
            self.log.note(id, Cause::Unspill, bytes, begun_us, self.device.now_us());
        }
        outcome
    }

    fn no_disk(&mut self, id: u64) -> Result<Error> {
        let requested_bytes = self.entry(id)?.copy.host_bytes() as u64;
        Ok(Error::Engine(engine::Error::Full {
            tier: Tier::Disk,
            requested_bytes,
            available_bytes: 0,
            budget_bytes: 0,
            advice: "give the pool a spill folder",
        }))
    }
}

fn write(file: &SpillFile, piece: &mut Piece) -> Result<()> {
    if let Place::Host { tape, .. } = &piece.place {
        piece.place = Place::Disk(Arc::new(file.write(tape.as_slice(piece.bytes)?)?));
    }
    Ok(())
}

fn read(piece: &mut Piece, tape: HostTape) -> Result<()> {
    if let Place::Disk(extent) = &piece.place {
        // The checksum is of the whole extent, of which a rewind may have cut some off.
        tape.append_host(extent.bytes(), |into| extent.read(into))?;
        piece.place = Place::Host { tape: Arc::new(tape), owned: false };
    }
    Ok(())
}

/// Does `work` with each item, `bytes` in all; each lane stops at its first failure, and the first lane's counts.
fn in_lanes<T: Send>(mut items: Vec<T>, bytes: usize, work: impl Fn(T) -> Result<()> + Sync) -> Result<()> {
    let lanes = (bytes / LANE_BYTES).clamp(1, LANES);
    if lanes == 1 {
        return items.into_iter().try_for_each(work);
    }
    let share = items.len().div_ceil(lanes).max(1);
    let work = &work;
    thread::scope(|scope| {
        let mut running = Vec::with_capacity(lanes);
        while !items.is_empty() {
            let lane = items.split_off(items.len().saturating_sub(share));
            running.push(scope.spawn(move || lane.into_iter().try_for_each(work)));
        }
        let outcomes =
            running.into_iter().map(|lane| lane.join().unwrap_or_else(|panic| resume_unwind(panic)));
        outcomes.fold(Ok(()), Result::and)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn lanes_do_everything_once() {
        for (count, bytes) in
            [(0, 0), (1, 1), (3, LANES * LANE_BYTES), (101, LANES * LANE_BYTES), (101, LANE_BYTES)]
        {
            let done = Mutex::new(Vec::new());
            let outcome = in_lanes((0..count).collect(), bytes, |item: usize| {
                done.lock().unwrap().push(item);
                Ok(())
            });
            let mut done = done.into_inner().unwrap();
            done.sort_unstable();
            assert!(outcome.is_ok() && done == (0..count).collect::<Vec<_>>(), "{count} items: {done:?}");
        }
    }

    #[test]
    fn a_failure_stops_its_own_lane_and_is_told() {
        let done = Mutex::new(Vec::new());
        let outcome = in_lanes((0..8).collect(), LANES * LANE_BYTES, |item: u64| {
            done.lock().unwrap().push(item);
            if item == 2 { Err(Error::Unknown { id: item }) } else { Ok(()) }
        });
        assert!(matches!(outcome, Err(Error::Unknown { id: 2 })), "{outcome:?}");
        let mut done = done.into_inner().unwrap();
        done.sort_unstable();
        assert_eq!(done, [0, 1, 2, 4, 5, 6, 7]);
    }
}

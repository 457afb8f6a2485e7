//! The host copy of a session: per layer and part a run of pieces, in host memory or on disk.
//!
//! Pieces are never rewritten, so sessions that were forked share them; only the tail of a run
//! grows, and only under the session that made it. A session that shares a tail starts a piece of
//! its own: that is all that copy-on-write takes here.

use std::{ops::Range, sync::Arc};

use overspill_device::HostTape;
use overspill_engine::DiskExtent;

use crate::{Geometry, Part};

/// A run's part in host memory, and which bytes of it count.
pub(crate) type Stretch = (Arc<HostTape>, Range<usize>);

/// See the module.
#[derive(Default)]
pub(crate) struct HostCopy {
    runs: Vec<[Run; 2]>,
}

/// The bytes of one part of one layer, from the first token on.
#[derive(Default)]
pub(crate) struct Run {
    pub pieces: Vec<Piece>,
}

pub(crate) struct Piece {
    pub bytes: usize,
    pub place: Place,
}

pub(crate) enum Place {
    /// `owned` is whether this session may append to it.
    Host {
        tape: Arc<HostTape>,
        owned: bool,
    },
    Disk(Arc<DiskExtent>),
}

impl Piece {
    pub fn is_on_disk(&self) -> bool {
        self.extent_bytes().is_some()
    }

    /// What it takes on disk, if it is there: at least the bytes that count.
    pub fn extent_bytes(&self) -> Option<usize> {
        match &self.place {
            Place::Disk(extent) => Some(extent.bytes()),
            Place::Host { .. } => None,
        }
    }
}

impl HostCopy {
    pub fn new(geometry: &Geometry) -> Self {
        Self { runs: (0..geometry.layers).map(|_| Default::default()).collect() }
    }

    pub fn run(&self, layer: usize, part: Part) -> &Run {
        &self.runs[layer][part as usize]
    }

    pub fn run_mut(&mut self, layer: usize, part: Part) -> &mut Run {
        &mut self.runs[layer][part as usize]
    }

    pub fn pieces_mut(&mut self) -> impl Iterator<Item = &mut Piece> {
        self.runs.iter_mut().flatten().flat_map(|run| &mut run.pieces)
    }

    /// The same bytes for another session, which will not append to these pieces.
    pub fn share(&self) -> Self {
        Self { runs: self.runs.iter().map(|runs| [runs[0].share(), runs[1].share()]).collect() }
    }

    /// Bytes in host memory, shared ones included.
    pub fn host_bytes(&self) -> usize {
        let pieces = self.runs.iter().flatten().flat_map(|run| &run.pieces);
        pieces.filter(|piece| matches!(piece.place, Place::Host { .. })).map(|piece| piece.bytes).sum()
    }

    /// Bytes on disk.
    pub fn disk_bytes(&self) -> usize {
        let pieces = self.runs.iter().flatten().flat_map(|run| &run.pieces);
        pieces.filter(|piece| matches!(piece.place, Place::Disk(_))).map(|piece| piece.bytes).sum()
    }

    pub fn clear(&mut self) {
        self.runs.iter_mut().flatten().for_each(|run| run.pieces.clear());
    }
}

impl Run {
    /// The tape that the next bytes go to, and how many it takes.
    pub fn tail(&self) -> Option<(Arc<HostTape>, usize)> {
        let last = self.pieces.last()?;
        let Place::Host { tape, owned: true } = &last.place else { return None };
        let room = tape.capacity_bytes() - last.bytes;
        (room > 0).then(|| (Arc::clone(tape), room))
    }

    /// Adds a tape to append to, `bytes` of which count already.
    pub fn push(&mut self, tape: HostTape, bytes: usize) {
        self.pieces.push(Piece { bytes, place: Place::Host { tape: Arc::new(tape), owned: true } });
    }

    /// Counts bytes that were appended to `tape`, a piece of this run.
    pub fn grew(&mut self, tape: &Arc<HostTape>, bytes: usize) {
        let is_it = |piece: &&mut Piece| matches!(&piece.place, Place::Host { tape: own, .. } if Arc::ptr_eq(own, tape));
        if let Some(piece) = self.pieces.iter_mut().rev().find(is_it) {
            piece.bytes += bytes;
        }
    }

    /// Forgets all but the first `bytes`. A tape that was cut is never appended to again: what comes
    /// next begins a piece of its own.
    pub fn truncate(&mut self, bytes: usize) {
        let mut left = bytes;
        for piece in &mut self.pieces {
            let kept = piece.bytes.min(left);
            if let (true, Place::Host { owned, .. }) = (kept < piece.bytes, &mut piece.place) {
                *owned = false;
            }
            piece.bytes = kept;
            left -= kept;
        }
        self.pieces.retain(|piece| piece.bytes > 0);
    }

    /// The pieces as stretches of host memory; `None` if one of them is on disk.
    pub fn stretches(&self) -> Option<Vec<Stretch>> {
        let of = |piece: &Piece| match &piece.place {
            Place::Host { tape, .. } => Some((Arc::clone(tape), 0..piece.bytes)),
            Place::Disk(_) => None,
        };
        self.pieces.iter().filter(|piece| piece.bytes > 0).map(of).collect()
    }

    fn share(&self) -> Self {
        let share = |piece: &Piece| Piece {
            bytes: piece.bytes,
            place: match &piece.place {
                Place::Host { tape, .. } => Place::Host { tape: Arc::clone(tape), owned: false },
                Place::Disk(extent) => Place::Disk(Arc::clone(extent)),
            },
        };
        Self { pieces: self.pieces.iter().filter(|piece| piece.bytes > 0).map(share).collect() }
    }
}

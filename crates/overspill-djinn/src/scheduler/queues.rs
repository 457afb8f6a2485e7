//! Sessions in the orders in which they are asked for: ordered sets of (key, session), so that a change
//! and a question cost the logarithm of the number of sessions, and equal keys always come in one order.

use std::collections::BTreeSet;

/// What a queue holds, and its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Queue {
    /// Ready and on the device, by deadline.
    Run,
    /// Ready and on its way, by deadline.
    Coming,
    /// Ready and away, but not on disk, by deadline.
    Wanted,
    /// Ready and new: it has nothing yet, by deadline.
    New,
    /// Ready and on disk, by deadline.
    WantedDisk,
    /// Waits, away, by the time at which it has to set out.
    Due,
    /// Waits, on disk, by the time at which reading has to start.
    DueDisk,
    /// Waits on the device and is clean, the last one leaves first.
    Clean,
    /// Waits on the device and is dirty, the last one leaves first.
    Dirty,
    /// Waits on its way to the device, the last one leaves first, and only if nobody else can.
    Landing,
    /// Waits, away, in host memory, the last one gives way first.
    Away,
    /// On the device, with a host copy, the first one's goes first.
    Copies,
    /// Waits, by the time at which it is expected.
    Expected,
    /// Could not be moved, by the time at which to try again.
    Blocked,
}

const COUNT: usize = Queue::Blocked as usize + 1;

/// The queues that a session is in, with its keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Keys([Option<u64>; COUNT]);

impl Keys {
    pub fn put(&mut self, queue: Queue, key: u64) {
        self.0[queue as usize] = Some(key);
    }
}

/// All queues.
#[derive(Debug, Clone, Default)]
pub(super) struct Queues([BTreeSet<(u64, u64)>; COUNT]);

impl Queues {
    /// Moves a session from where it was to where it is.
    pub fn replace(&mut self, id: u64, before: &Keys, after: &Keys) {
        for ((queue, before), after) in self.0.iter_mut().zip(before.0).zip(after.0) {
            if before != after {
                before.map(|key| queue.remove(&(key, id)));
                after.map(|key| queue.insert((key, id)));
            }
        }
    }

    pub fn len(&self, queue: Queue) -> usize {
        self.0[queue as usize].len()
    }

    /// The lowest key, and whose it is.
    pub fn first(&self, queue: Queue) -> Option<(u64, u64)> {
        self.0[queue as usize].first().copied()
    }

    /// The highest key.
    pub fn last_key(&self, queue: Queue) -> Option<u64> {
        self.0[queue as usize].last().map(|&(key, _)| key)
    }

    /// The lowest key if it is not above `limit`.
    pub fn first_by(&self, queue: Queue, limit: u64) -> Option<(u64, u64)> {
        self.first(queue).filter(|&(key, _)| key <= limit)
    }

    /// The first session that is not `keep`.
    pub fn first_but(&self, queue: Queue, keep: u64) -> Option<u64> {
        self.0[queue as usize].iter().map(|&(_, id)| id).find(|&id| id != keep)
    }

    /// The last session that is not `keep`.
    pub fn last_but(&self, queue: Queue, keep: u64) -> Option<u64> {
        self.0[queue as usize].iter().rev().map(|&(_, id)| id).find(|&id| id != keep)
    }

    /// How many keys are below `limit`, counted up to `most`.
    pub fn count_below(&self, queue: Queue, limit: u64, most: usize) -> usize {
        self.0[queue as usize].iter().take(most).take_while(|&&(key, _)| key < limit).count()
    }
}

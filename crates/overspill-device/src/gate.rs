//! A one-shot flag that a thread can sleep on.
//!
//! Host work (a disk write, say) opens its gate when it has finished. Wait through
//! [`crate::Device::block_on`], never directly: the seeded backend has no other thread that could
//! open it and must run its own queues meanwhile.

use std::sync::{Condvar, Mutex, PoisonError};

/// Closed at first, opened once.
#[derive(Debug, Default)]
pub struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    /// A closed gate.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Opens the gate and wakes all that wait.
    pub fn open(&self) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.opened.notify_all();
    }

    /// Whether the gate is open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps until the gate is open. For backends whose queues run on threads.
    pub fn sleep(&self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        while !*open {
            open = self.opened.wait(open).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

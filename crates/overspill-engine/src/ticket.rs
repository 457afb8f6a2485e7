//! How far an onboarding has come.

use std::sync::{Mutex, MutexGuard, PoisonError};

use overspill_device::Gate;

use crate::{Error, Result};

/// Counts the pieces of one onboarding; the gate opens when all are enqueued or have failed.
pub(crate) struct Ticket {
    gate: Gate,
    state: Mutex<State>,
}

struct State {
    pieces_left: usize,
    last_sequence: Option<u64>,
    error: Option<Error>,
}

impl Ticket {
    pub fn new(pieces: usize) -> std::sync::Arc<Self> {
        let ticket = Self {
            gate: Gate::new(),
            state: Mutex::new(State { pieces_left: pieces, last_sequence: None, error: None }),
        };
        if pieces == 0 {
            ticket.gate.open();
        }
        std::sync::Arc::new(ticket)
    }

    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// One piece has been enqueued at a position of the onboard queue, or has failed.
    pub fn piece_sent(&self, sent: Result<u64>) {
        let mut state = self.state();
        match sent {
            Ok(sequence) => state.last_sequence = state.last_sequence.max(Some(sequence)),
            Err(error) => state.error = Some(error),
        }
        state.pieces_left -= 1;
        if state.pieces_left == 0 {
            self.gate.open();
        }
    }

    /// After the gate has opened: the position of the last copy, or what went wrong.
    pub fn outcome(&self) -> Result<Option<u64>> {
        let state = self.state();
        state.error.clone().map_or(Ok(state.last_sequence), Err)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! Turns: whose it is to compute next, for a caller that has more to compute than the device holds.
//!
//! [`Pool::begin`] brings a session at once, and its forward waits for the copies. A caller with others to
//! step meanwhile asks for a turn instead ([`Pool::ask`]): the scheduler brings the session, the one that is
//! due first before the others, and [`Pool::turns`] says when it is there. From then on it counts as one that
//! computes, also between its forwards, so that nobody takes its slab until [`Pool::end_turn`].
//!
//! Who may ask is the caller's business. More turns than slabs are no error: they come one after the other.

use crate::{Pool, Residency, Result, scheduler::Event};

impl Pool {
    /// `id` has something to compute, and should start `due_us` from now.
    pub fn ask(&mut self, id: u64, due_us: u64) -> Result<()> {
        self.at_rest(id)?;
        self.entry(id)?.has_turn = true;
        let deadline_us = Some(self.now_us().saturating_add(due_us));
        self.note(Event::Ready { id, deadline_us })
    }

    /// Does what the scheduler has to do by now; those that asked and whose turn it is since the last call.
    /// Where a copy cannot be made, for whatever reason, it is the turn of those that wait for one: their own
    /// forwards make room, or say why not.
    pub fn turns(&mut self) -> Result<Vec<u64>> {
        self.reap()?;
        while let Some(decision) = self.scheduler.next(self.now_us()) {
            if self.carry_out(decision).is_err() {
                let away = self
                    .sessions
                    .iter()
                    .filter(|(_, entry)| entry.has_turn && entry.session.residency() == Residency::Away);
                self.turns.extend(away.map(|(&id, _)| id));
                break;
            }
        }
        self.turns.sort_unstable();
        self.turns.dedup();
        Ok(std::mem::take(&mut self.turns))
    }

    /// `id` computes no more for now, or asks no more. Does nothing if it has not asked.
    pub fn end_turn(&mut self, id: u64) -> Result<()> {
        let entry = self.entry(id)?;
        if !std::mem::take(&mut entry.has_turn) {
            return Ok(());
        }
        let runs = entry.session.is_running();
        self.turns.retain(|&turn| turn != id);
        // What runs still is noted when it ends.
        if runs { Ok(()) } else { self.note(Event::Paused { id, eta_us: None }) }
    }
}

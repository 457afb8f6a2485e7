//! The scheduler's executor: what happens to sessions is noted, what it decides is carried out.
//!
//! Who just computes is brought here at once ([`Pool::begin`]); who asked for a turn is told when it is there
//! ([`Pool::turns`]). A place is given up and taken as soon as its copies are enqueued; a session counts as on
//! its way until they have ended, which is also when the speed of the link is taken.

use overspill_device::EventRef;

use crate::{
    Error, Pool, PoolConfig, Refusal, Result,
    scheduler::{Costs, Decision, Event, Policy, Scheduler, SchedulerConfig, Size},
};

/// Until a copy has been timed: PCIe Gen4 x16, on the safe side of what is measured on Gen5.
pub(crate) const LINK_US_PER_BYTE: f64 = 1.0 / 20e3;
/// Disks are not timed: on the safe side of one NVMe disk.
const DISK_US_PER_BYTE: f64 = 1.0 / 1e3;
/// How soon to look again where the link or host memory was taken.
const RETRY_US: u64 = 5_000;
/// Copies that are shorter say more of the call than of the link.
const TIMED_FROM_BYTES: u64 = 16 << 20;

/// A session whose copies into its slab are under way.
pub(crate) struct Coming {
    pub id: u64,
    begin: EventRef,
    end: EventRef,
    bytes: u64,
}

pub(crate) fn scheduler_for(config: &PoolConfig, slabs: usize, has_disk: bool) -> Scheduler {
    let geometry = config.geometry;
    Scheduler::new(SchedulerConfig {
        slabs,
        live_sessions: usize::MAX,
        seats: slabs,
        spare_slabs: 1,
        arrivals: 2,
        reads: 1,
        patience_us: 0,
        retry_us: RETRY_US,
        clean_below_bytes: (2 * geometry.layers * config.lag_tokens * geometry.token_bytes) as u64,
        costs: Costs {
            out_us_per_byte: LINK_US_PER_BYTE,
            in_us_per_byte: LINK_US_PER_BYTE,
            write_us_per_byte: has_disk.then_some(DISK_US_PER_BYTE),
            read_us_per_byte: DISK_US_PER_BYTE,
            // A prefill gives other bits than the steps that made the tokens.
            recompute_us_per_token: None,
        },
        policy: Policy::DJINN,
    })
}

impl Pool {
    /// `id` will be needed `eta_us` from now, on the device's clock. [`Pool::tick`] sends it away if memory is
    /// short and it is gone for long enough, and brings it back.
    pub fn expect(&mut self, id: u64, eta_us: f64) -> Result<()> {
        self.at_rest(id)?;
        self.note(Event::Paused { id, eta_us: Some(eta_us.max(0.0) as u64) })
    }

    /// Does what is due: brings sessions back that will be needed, as far as there is room, and sends
    /// sessions away before room is needed. Who is due within `lead_us` more than its way takes comes back
    /// as well. How many came back.
    pub fn tick(&mut self, lead_us: f64) -> Result<usize> {
        self.reap()?;
        let before = self.counters.restores;
        while let Some(decision) = self.scheduler.next_within(self.now_us(), lead_us.max(0.0) as u64) {
            match self.carry_out(decision) {
                // It stays where it is: its next forward makes room, or says why not.
                Err(error) if error.is_full() => break,
                outcome => outcome?,
            }
        }
        Ok((self.counters.restores - before) as usize)
    }

    /// How long until [`Pool::tick`] has something to do, should nothing happen until then.
    #[must_use]
    pub fn wake_us(&self) -> Option<u64> {
        let now_us = self.now_us();
        self.scheduler.wake_us(now_us).map(|wake_us| wake_us.saturating_sub(now_us))
    }

    /// Carries out a decision; if that fails, everybody is where they were.
    pub(crate) fn carry_out(&mut self, decision: Decision) -> Result<()> {
        let outcome = match decision {
            Decision::Restore(id) => self.arrive(id),
            Decision::Evict(id) => self.leave(id),
            Decision::Spill(id) => self.spill(id),
            Decision::Unspill(id) => self.unspill(id),
            Decision::DropHostCopy(id) => self.drop_host_copy(id),
            Decision::Run(id) => {
                self.turns.push(id);
                Ok(())
            }
            // Nobody is thrown away.
            Decision::Recompute(_) | Decision::Discard(_) => Ok(()),
        };
        match (&outcome, decision) {
            (Err(_), _) => self.note(Event::Failed(decision))?,
            // Its copies run still.
            (Ok(()), Decision::Restore(_)) => {}
            (Ok(()), _) => self.note(Event::Done(decision))?,
        }
        outcome
    }

    pub(crate) fn note(&mut self, event: Event) -> Result<()> {
        let now_us = self.now_us();
        self.scheduler.note(now_us, event)
    }

    /// The forward of `id` is over; it computes no more unless it has a turn.
    pub(crate) fn rests(&mut self, id: u64) -> Result<()> {
        self.count(id)?;
        if self.entry(id)?.has_turn { Ok(()) } else { self.note(Event::Paused { id, eta_us: None }) }
    }

    /// Refuses what is not for a session that computes, or has a turn to.
    pub(crate) fn at_rest(&mut self, id: u64) -> Result<()> {
        let entry = self.entry(id)?;
        if entry.has_turn || entry.session.is_running() {
            return Err(Error::Refused { id, refusal: Refusal::Running });
        }
        Ok(())
    }

    /// Tells the scheduler what bytes `id` has and where.
    pub(crate) fn count(&mut self, id: u64) -> Result<()> {
        let token_bytes = 2 * self.config.geometry.token_bytes as u64;
        let entry = self.entry(id)?;
        let (marks, most) = entry.session.totals();
        let size = Size {
            tokens: most as u64,
            bytes: marks.written as u64 * token_bytes,
            dirty_bytes: (marks.written - marks.clean) as u64 * token_bytes,
            host_bytes: entry.copy.host_bytes() as u64,
            disk_bytes: entry.copy.disk_bytes() as u64,
        };
        self.note(Event::Sized { id, size })
    }

    /// `id` is on its way from `begin` on.
    pub(crate) fn comes(&mut self, id: u64, begin: EventRef) -> Result<()> {
        let bytes = self.entry(id)?.copy.host_bytes() as u64;
        let end = self.back.record()?;
        self.coming.retain(|coming| coming.id != id);
        self.coming.push(Coming { id, begin, end, bytes });
        Ok(())
    }

    /// Takes note of those that have arrived.
    pub(crate) fn meet(&mut self) -> Result<()> {
        for coming in std::mem::take(&mut self.coming) {
            if !coming.end.is_done()? {
                self.coming.push(coming);
                continue;
            }
            if coming.bytes >= TIMED_FROM_BYTES {
                let us_per_byte = (coming.end.time_us()? - coming.begin.time_us()?) / coming.bytes as f64;
                self.link_us_per_byte = self.link_us_per_byte.min(us_per_byte);
                self.scheduler.set_link(self.link_us_per_byte, self.link_us_per_byte);
            }
            self.note(Event::Done(Decision::Restore(coming.id)))?;
        }
        Ok(())
    }

    pub(crate) fn now_us(&self) -> u64 {
        self.device.now_us().max(0.0) as u64
    }
}

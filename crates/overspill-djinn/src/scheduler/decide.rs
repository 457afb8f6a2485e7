//! Decisions, in the order in which they matter.

use super::{Decision, Departure, Known, Moving, Phase, Place, Queue, Scheduler, Victim, known::Size};
use crate::{Error, Result};

/// A session that leaves stays away for at least this many times what leaving and coming back cost.
const HYSTERESIS: f64 = 2.0;
/// Sessions whose expectation is made anew in one call: the time of a call is bounded, and who is
/// left over is next in the next one.
const EXPECTED_AT_ONCE: usize = 8;
/// Nobody's number: no session is kept from giving way.
const NOBODY: u64 = u64::MAX;

impl Scheduler {
    /// What is to be done next, if anything is.
    pub fn next(&mut self, now_us: u64) -> Option<Decision> {
        self.next_within(now_us, 0)
    }

    /// As [`Scheduler::next`], and who waits sets out this much earlier than it has to.
    pub fn next_within(&mut self, now_us: u64, lead_us: u64) -> Option<Decision> {
        let horizon_us = now_us.saturating_add(lead_us);
        self.wait_on(now_us);
        self.run(now_us)
            .or_else(|| self.onboard(now_us))
            .or_else(|| self.read(horizon_us))
            .or_else(|| self.foresee(now_us, horizon_us))
            .or_else(|| self.make_spare(now_us, horizon_us))
    }

    /// When to ask again, should nothing happen until then.
    #[must_use]
    pub fn wake_us(&self, now_us: u64) -> Option<u64> {
        let retry_us = now_us.saturating_add(self.config.retry_us);
        [Queue::Due, Queue::DueDisk, Queue::Blocked]
            .into_iter()
            .filter_map(|queue| self.queues.first(queue))
            .map(|(key_us, _)| if key_us > now_us { key_us } else { retry_us })
            .min()
    }

    /// The next step toward a slab for `id`, which comes before all others, even before those on their
    /// way; `None` once it has one.
    ///
    /// # Errors
    /// [`Error::NoSlab`] if every slab is another's who cannot leave.
    pub fn demand(&mut self, now_us: u64, id: u64) -> Result<Option<Decision>> {
        if self.known(id)?.place != Place::Away {
            return Ok(None);
        }
        if self.free_slabs() > 0 {
            return Ok(Some(self.seat(now_us, id)));
        }
        self.wait_on(now_us);
        while let Some((_, blocked)) = self.queues.first(Queue::Blocked) {
            self.must_change(blocked, |known| known.blocked_until_us = None);
        }
        let victim = self.victim(now_us, id).or_else(|| self.queues.last_but(Queue::Landing, id));
        let victim = victim.ok_or(Error::NoSlab { slabs: self.config.slabs })?;
        Ok(Some(self.send_away(victim)))
    }

    /// What gives way for host memory that `keep` needs, if anything can: host copies of sessions on the
    /// device, which are dirty then; else who is away and needed last goes to disk, or is thrown away.
    pub fn give_way(&mut self, keep: u64) -> Option<Decision> {
        if let Some(id) = self.queues.first_but(Queue::Copies, keep) {
            return Some(Decision::DropHostCopy(id));
        }
        let id = self.queues.last_but(Queue::Away, keep)?;
        let size = self.sessions.get(&id)?.size;
        let discard_us = self.discard_us(&size);
        match (self.spill_us(&size), discard_us) {
            (None, None) => None,
            (Some(spill_us), discard_us) if discard_us.is_none_or(|us| spill_us <= us) => {
                self.must_change(id, |known| known.moving = Some(Moving::Writing));
                Some(Decision::Spill(id))
            }
            _ => Some(Decision::Discard(id)),
        }
    }

    /// Expects those anew that did not come when they were expected, and tries those again that failed.
    fn wait_on(&mut self, now_us: u64) {
        for _ in 0..EXPECTED_AT_ONCE {
            let Some((_, id)) = self.queues.first_by(Queue::Expected, now_us) else { break };
            self.must_change(id, |known| {
                if let Phase::Waiting { since_us, .. } = known.phase {
                    let waited_us = (now_us - since_us).max(1);
                    let next_us = now_us.saturating_add(waited_us);
                    known.phase = Phase::Waiting { since_us, next_us, is_told: false };
                }
            });
        }
        while let Some((_, id)) = self.queues.first_by(Queue::Blocked, now_us) {
            self.must_change(id, |known| known.blocked_until_us = None);
        }
    }

    /// The ready session on the device whose deadline comes first computes if there is a seat that is
    /// not kept for one on its way that is overdue.
    fn run(&mut self, now_us: u64) -> Option<Decision> {
        let free = self.config.seats.saturating_sub(self.tally.running);
        let (deadline_us, id) = self.queues.first(Queue::Run)?;
        let kept = self.queues.count_below(Queue::Coming, deadline_us.min(now_us), free);
        if free <= kept {
            return None;
        }
        self.must_change(id, |known| known.start(now_us));
        Some(Decision::Run(id))
    }

    /// The ready session whose deadline comes first gets a slab, if need be a waiting one's.
    fn onboard(&mut self, now_us: u64) -> Option<Decision> {
        if self.tally.arriving >= self.config.arrivals {
            return None;
        }
        let has_room = self.tally.live < self.config.live_sessions;
        let new = self.queues.first(Queue::New).filter(|_| has_room);
        let wanted = self.queues.first(Queue::Wanted);
        let (_, id) = wanted.into_iter().chain(new).min()?;
        if self.free_slabs() > 0 {
            return Some(self.seat(now_us, id));
        }
        let victim = self.victim(now_us, id)?;
        Some(self.send_away(victim))
    }

    /// Of those on disk, the ready one whose deadline comes first is read; else who has to set out.
    fn read(&mut self, horizon_us: u64) -> Option<Decision> {
        if self.tally.reading >= self.config.reads {
            return None;
        }
        let wanted = self.queues.first(Queue::WantedDisk);
        let (_, id) = wanted.or_else(|| self.queues.first_by(Queue::DueDisk, horizon_us))?;
        self.must_change(id, |known| {
            known.moving = Some(Moving::Reading);
            known.was_read = true;
        });
        Some(Decision::Unspill(id))
    }

    /// Who will be needed sets out while there is room, or in the place of one that is needed much later.
    fn foresee(&mut self, now_us: u64, horizon_us: u64) -> Option<Decision> {
        while self.tally.arriving < self.config.arrivals {
            let (_, id) = self.queues.first_by(Queue::Due, horizon_us)?;
            let Phase::Waiting { next_us, is_told, .. } = self.sessions.get(&id)?.phase else { return None };
            let free = self.free_slabs();
            if free > if is_told { 0 } else { self.config.spare_slabs } {
                return Some(self.seat(now_us, id));
            }
            let victim = self.victim(now_us, id).filter(|_| is_told && free == 0);
            if let Some(victim) = victim.filter(|&victim| self.is_gone_for_long(victim, next_us)) {
                return Some(self.send_away(victim));
            }
            // Without room it waits until it is ready, and so does not stand before others.
            self.must_change(id, |known| known.was_foreseen = true);
        }
        None
    }

    /// Keeps a few slabs free, so that who becomes ready has one at once.
    fn make_spare(&mut self, now_us: u64, horizon_us: u64) -> Option<Decision> {
        let policy = self.config.policy;
        let is_short = self.free_slabs() < self.config.spare_slabs;
        if !(policy.leaves_at_pause || policy.foresees && is_short) {
            return None;
        }
        let victim = self.victim(now_us, NOBODY)?;
        let leaves = policy.leaves_at_pause || self.is_gone_for_long(victim, horizon_us);
        leaves.then(|| self.send_away(victim))
    }

    /// Whether a session is needed so long after `from_us` that its way out and back is worth it.
    fn is_gone_for_long(&self, id: u64, from_us: u64) -> bool {
        self.sessions.get(&id).is_some_and(|known| {
            let Phase::Waiting { next_us, .. } = known.phase else { return false };
            let swap_us = self.swap_us(&known.size);
            let cost_us = self.discard_us(&known.size).map_or(swap_us, |us| us.min(swap_us));
            next_us.saturating_sub(from_us) as f64 > HYSTERESIS * cost_us
        })
    }

    /// The waiting session on the device that leaves first.
    fn victim(&self, now_us: u64, keep: u64) -> Option<u64> {
        let clean = self.queues.last_but(Queue::Clean, keep);
        let dirty = self.queues.last_but(Queue::Dirty, keep);
        let (Some(clean_id), Some(dirty_id)) = (clean, dirty) else { return clean.or(dirty) };
        let clean_goes = match self.config.policy.victim {
            Victim::NextUse => match (self.told_us(clean_id), self.told_us(dirty_id)) {
                // Who leaves before its turn takes another's slab to come back: that costs more than a way out.
                (Some(clean_us), Some(_)) => !self.is_gone_for_long(dirty_id, clean_us.max(now_us)),
                _ => self.is_gone_for_long(clean_id, now_us) || !self.is_gone_for_long(dirty_id, now_us),
            },
            _ => self.queues.last_key(Queue::Clean) >= self.queues.last_key(Queue::Dirty),
        };
        if clean_goes { clean } else { dirty }
    }

    /// When a waiting session will be needed, if it said so.
    fn told_us(&self, id: u64) -> Option<u64> {
        match self.sessions.get(&id)?.phase {
            Phase::Waiting { next_us, is_told: true, .. } => Some(next_us),
            _ => None,
        }
    }

    /// Takes a free slab for a session that is away.
    fn seat(&mut self, now_us: u64, id: u64) -> Decision {
        let mut decision = Decision::Restore(id);
        self.must_change(id, |known| {
            if known.return_bytes() == 0 && known.size.tokens > 0 {
                decision = Decision::Recompute(id);
            }
            known.was_foreseen = true;
            known.sit(now_us, Place::Arriving);
        });
        decision
    }

    /// Takes the slab of a waiting session, the cheaper way.
    fn send_away(&mut self, id: u64) -> Decision {
        let size = self.sessions.get(&id).map(|known| known.size).unwrap_or_default();
        self.must_change(id, |known| known.place = Place::Away);
        let discards = match self.config.policy.departure {
            Departure::Swap => false,
            Departure::Discard => true,
            Departure::Cheapest => self.discard_us(&size).is_some_and(|us| us < self.swap_us(&size)),
        };
        if discards { Decision::Discard(id) } else { Decision::Evict(id) }
    }

    /// What leaving and coming back costs: time on the link, for each that waits for the link.
    fn swap_us(&self, size: &Size) -> f64 {
        let costs = &self.config.costs;
        let waiting = (1 + self.queues.len(Queue::Wanted)) as f64;
        size.dirty_bytes as f64 * costs.out_us_per_byte + waiting * size.bytes as f64 * costs.in_us_per_byte
    }

    /// What going to disk and coming back costs: time of the disk, for each that waits for the disk.
    fn spill_us(&self, size: &Size) -> Option<f64> {
        let costs = &self.config.costs;
        let writing = (1 + self.tally.writing) as f64;
        let reading = (1 + self.tally.reading + self.queues.len(Queue::WantedDisk)) as f64;
        let round_us = writing * costs.write_us_per_byte? + reading * costs.read_us_per_byte;
        Some(size.host_bytes as f64 * round_us)
    }

    /// What throwing away costs: compute, for each that computes and waits meanwhile.
    fn discard_us(&self, size: &Size) -> Option<f64> {
        let us_per_token = self.config.costs.recompute_us_per_token?;
        Some((1 + self.tally.running) as f64 * size.tokens as f64 * us_per_token)
    }

    /// Changes a session that is in a queue, and so is known.
    fn must_change(&mut self, id: u64, how: impl FnOnce(&mut Known)) {
        let changed = self.change(id, |known| {
            how(known);
            Ok(())
        });
        debug_assert!(changed.is_ok(), "session {id} is in a queue and unknown");
    }
}

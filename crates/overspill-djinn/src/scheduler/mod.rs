//! Who has a slab, who computes, and who goes where: a state machine without a clock.
//!
//! An executor notes what happens ([`Event`]) with the time at which it did, and asks for decisions
//! until there is none. Each decision is carried out, or reported as failed, before the next one is
//! asked for; copies that it starts may end later ([`Event::Done`]). The same events at the same times
//! give the same decisions. A decision costs the logarithm of the number of sessions.
//!
//! The rules. *Ready* sessions come first, by deadline, on each of the three ways there are: from disk,
//! over the link, into a seat. A deadline is at most `patience_us` after its session was ready, if
//! nobody says otherwise, so that who became ready more than that later never goes first: nobody
//! starves. Past its deadline a session on its way has a seat kept for it. *Waiting* sessions give
//! their slabs to ready ones: first those that are clean, since they leave for nothing, and of those
//! the one that will be needed last; one that is not clean goes before it if both said when they will be
//! needed, and it so much later that its way out and back pays. A session that said when it will be needed leaves before memory
//! is short, if it is away for long enough to be worth it, and sets out before it is due; it takes the
//! slab of another one only if that one is needed so much later that its own way out and back is
//! paid for twice: else two sessions could push each other out for ever. A session that says nothing
//! is expected after as long as it uses to wait; who is overdue is expected after as long again as it
//! has waited, and comes back ahead of time into a free slab only.
//!
//! What it does not do: copies, and the count of host memory and disk. Their owner knows when they are
//! full, and asks who gives way ([`Scheduler::give_way`]).

mod config;
mod decide;
mod known;
mod queues;

use std::collections::HashMap;

pub use config::{Costs, Departure, Policy, SchedulerConfig, Victim};
pub use known::Size;
use known::{Known, Moving, Phase, Place, Tally};
use queues::{Queue, Queues};

use crate::{Error, Refusal, Result};

/// What the executor is to do. Each names a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Compute.
    Run(u64),
    /// Copy it into a free slab.
    Restore(u64),
    /// Compute its keys and values again, in a free slab.
    Recompute(u64),
    /// Off the device; what is dirty is copied out.
    Evict(u64),
    /// Off the device and out of memory.
    Discard(u64),
    /// Its host copy to disk.
    Spill(u64),
    /// Its host copy back from disk.
    Unspill(u64),
    /// Give up the host copy of a session on the device.
    DropHostCopy(u64),
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A session, away and empty.
    Created {
        /// Which.
        id: u64,
    },
    /// It has something to compute.
    Ready {
        /// Which.
        id: u64,
        /// By when its next token should be there.
        deadline_us: Option<u64>,
    },
    /// It computes, told to or not.
    Started {
        /// Which.
        id: u64,
    },
    /// It computes no more, or says now how long it will wait.
    Paused {
        /// Which.
        id: u64,
        /// From now, if it knows.
        eta_us: Option<u64>,
    },
    /// It is over, and has nothing any more.
    Finished {
        /// Which.
        id: u64,
    },
    /// Its bytes were counted.
    Sized {
        /// Which.
        id: u64,
        /// What was counted.
        size: Size,
    },
    /// It took a free slab of the executor's own accord.
    Seated {
        /// Which.
        id: u64,
    },
    /// It gave its slab up of the executor's own accord.
    Left {
        /// Which.
        id: u64,
    },
    /// A decision has been carried out to the end.
    Done(Decision),
    /// A decision could not be carried out: the session is where it was.
    Failed(Decision),
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Scheduler {
    config: SchedulerConfig,
    sessions: HashMap<u64, Known>,
    queues: Queues,
    tally: Tally,
}

impl Scheduler {
    /// A scheduler of no sessions.
    #[must_use]
    pub fn new(config: SchedulerConfig) -> Self {
        Self { config, sessions: HashMap::new(), queues: Queues::default(), tally: Tally::default() }
    }

    /// Takes note of what happened.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::Exists`], [`Error::NoSlab`], or [`Error::Refused`] for what cannot
    /// have happened; nothing is changed then.
    pub fn note(&mut self, now_us: u64, event: Event) -> Result<()> {
        match event {
            Event::Created { id } => {
                if self.sessions.contains_key(&id) {
                    return Err(Error::Exists { id });
                }
                self.sessions.insert(id, Known::new(now_us));
                Ok(())
            }
            Event::Ready { id, deadline_us } => {
                let deadline_us =
                    deadline_us.unwrap_or_else(|| now_us.saturating_add(self.config.patience_us));
                self.change(id, |known| {
                    known.learn(now_us);
                    known.phase = Phase::Ready { deadline_us };
                    Ok(())
                })
            }
            Event::Started { id } => self.change(id, |known| {
                if known.place == Place::Away {
                    return Err(Refusal::Away);
                }
                known.start(now_us);
                Ok(())
            }),
            Event::Paused { id, eta_us } => self.paused(now_us, id, eta_us),
            Event::Finished { id } => {
                let known = self.sessions.remove(&id).ok_or(Error::Unknown { id })?;
                self.queues.replace(id, &known.keys(&self.config), &Default::default());
                self.tally = self.tally.less(known.tally());
                Ok(())
            }
            Event::Sized { id, size } => {
                let costs = self.config.costs;
                self.change(id, |known| {
                    known.measure(size, &costs);
                    Ok(())
                })
            }
            Event::Seated { id } => {
                let slabs = self.config.slabs;
                if self.free_slabs() == 0 && self.known(id)?.place == Place::Away {
                    return Err(Error::NoSlab { slabs });
                }
                self.change(id, |known| {
                    known.sit(now_us, Place::Seated);
                    Ok(())
                })
            }
            Event::Left { id } => self.change(id, |known| {
                if known.phase == Phase::Running {
                    return Err(Refusal::Running);
                }
                known.place = Place::Away;
                Ok(())
            }),
            Event::Done(decision) => self.ended(now_us, decision, true),
            Event::Failed(decision) => self.ended(now_us, decision, false),
        }
    }

    fn paused(&mut self, now_us: u64, id: u64, eta_us: Option<u64>) -> Result<()> {
        let guess_us = self.known(id)?.guess_us(&self.config);
        self.change(id, |known| {
            let since_us = match known.phase {
                Phase::Waiting { since_us, .. } => since_us,
                _ => now_us,
            };
            if known.phase == Phase::Running {
                known.last_use_us = now_us;
            }
            let next_us = now_us.saturating_add(eta_us.unwrap_or(guess_us));
            known.phase = Phase::Waiting { since_us, next_us, is_told: eta_us.is_some() };
            (known.was_foreseen, known.was_read) = (false, false);
            Ok(())
        })
    }

    fn ended(&mut self, now_us: u64, decision: Decision, is_done: bool) -> Result<()> {
        let retry_us = now_us.saturating_add(self.config.retry_us);
        let (Decision::Run(id)
        | Decision::Restore(id)
        | Decision::Recompute(id)
        | Decision::Evict(id)
        | Decision::Discard(id)
        | Decision::Spill(id)
        | Decision::Unspill(id)
        | Decision::DropHostCopy(id)) = decision;
        self.change(id, |known| {
            match (decision, is_done) {
                (Decision::Restore(_) | Decision::Recompute(_), true) if known.place == Place::Arriving => {
                    known.place = Place::Seated;
                }
                (Decision::Restore(_) | Decision::Recompute(_), false) if known.place == Place::Arriving => {
                    known.place = Place::Away;
                }
                (Decision::Evict(_) | Decision::Discard(_), false) => known.place = Place::Seated,
                (Decision::Spill(_) | Decision::Unspill(_), _) => known.moving = None,
                _ => {}
            }
            if !is_done {
                known.blocked_until_us = Some(retry_us);
            }
            Ok(())
        })
    }

    /// Takes note of what the link turned out to do.
    pub fn set_link(&mut self, out_us_per_byte: f64, in_us_per_byte: f64) {
        self.config.costs.out_us_per_byte = out_us_per_byte;
        self.config.costs.in_us_per_byte = in_us_per_byte;
    }

    /// Slabs that nobody has.
    #[must_use]
    pub fn free_slabs(&self) -> usize {
        self.config.slabs.saturating_sub(self.tally.slabs)
    }

    /// Sessions in all.
    #[must_use]
    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// Sessions that are ready and do not compute yet.
    #[must_use]
    pub fn queued(&self) -> usize {
        [Queue::Run, Queue::Coming, Queue::New, Queue::Wanted, Queue::WantedDisk]
            .map(|queue| self.queues.len(queue))
            .iter()
            .sum()
    }

    fn known(&self, id: u64) -> Result<&Known> {
        self.sessions.get(&id).ok_or(Error::Unknown { id })
    }

    /// Changes a session, and with it the queues and the tally; a refusal changes nothing.
    fn change(
        &mut self,
        id: u64,
        how: impl FnOnce(&mut Known) -> std::result::Result<(), Refusal>,
    ) -> Result<()> {
        let known = self.sessions.get_mut(&id).ok_or(Error::Unknown { id })?;
        let (keys, tally) = (known.keys(&self.config), known.tally());
        how(known).map_err(|refusal| Error::Refused { id, refusal })?;
        self.queues.replace(id, &keys, &known.keys(&self.config));
        self.tally = self.tally.less(tally).plus(known.tally());
        Ok(())
    }
}

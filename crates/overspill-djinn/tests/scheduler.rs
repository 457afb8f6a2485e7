//! The scheduler under thousands of random histories: what must hold after every event and decision.

use overspill_djinn::scheduler::{Costs, Decision, Event, Policy, Scheduler, SchedulerConfig, Size};
use proptest::prelude::*;
use std::collections::BTreeMap;

const TOKEN_BYTES: u64 = 1000;
const PATIENCE_US: u64 = 1000;
const RETRY_US: u64 = 50;

fn config(slabs: usize, seats: usize, policy: Policy) -> SchedulerConfig {
    SchedulerConfig {
        slabs,
        live_sessions: 1000,
        seats,
        spare_slabs: 1,
        arrivals: 2,
        reads: 1,
        patience_us: PATIENCE_US,
        retry_us: RETRY_US,
        clean_below_bytes: 0,
        costs: Costs {
            out_us_per_byte: 1e-3,
            in_us_per_byte: 1e-3,
            write_us_per_byte: Some(1e-2),
            read_us_per_byte: 1e-2,
            recompute_us_per_token: Some(5.0),
        },
        policy,
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Waiting,
    Ready { since_us: u64, deadline_us: u64 },
    Running,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Seated,
    Arriving,
    Away,
}

/// A session as the test knows it.
#[derive(Debug, Clone)]
struct Seen {
    phase: Phase,
    place: Place,
    size: Size,
    is_moving: bool,
    blocked_until_us: u64,
}

/// A step of a history.
#[derive(Debug, Clone)]
enum Step {
    Create,
    Ready(usize, Option<u64>),
    Pause(usize, Option<u64>, u64),
    Finish(usize),
    /// Something under way ends, well or not.
    End(usize, bool),
    HostIsShort,
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let who = 0..64_usize;
    prop_oneof![
        2 => Just(Step::Create),
        4 => (who.clone(), prop::option::of(0..PATIENCE_US)).prop_map(|(n, us)| Step::Ready(n, us)),
        4 => (who.clone(), prop::option::of(0..5000_u64), 1..20_u64)
            .prop_map(|(n, eta, tokens)| Step::Pause(n, eta, tokens)),
        1 => who.clone().prop_map(Step::Finish),
        5 => (who, prop::bool::weighted(0.9)).prop_map(|(n, well)| Step::End(n, well)),
        1 => Just(Step::HostIsShort),
        4 => (1..800_u64).prop_map(Step::Pass),
    ]
}

fn policy() -> impl Strategy<Value = Policy> {
    prop::sample::select(vec![
        Policy::DJINN,
        Policy::DJINN,
        Policy::LRU,
        Policy::FIFO,
        Policy::ALWAYS_SWAP,
        Policy::NEVER_SWAP,
        Policy::RECOMPUTE,
    ])
}

/// The other side of the scheduler: an executor whose copies end when the history says so.
struct Executor {
    scheduler: Scheduler,
    slabs: usize,
    seats: usize,
    now_us: u64,
    seen: BTreeMap<u64, Seen>,
    under_way: Vec<Decision>,
    log: Vec<Decision>,
    next_id: u64,
}

type Checked = Result<(), TestCaseError>;

impl Executor {
    fn new(slabs: usize, seats: usize, policy: Policy) -> Self {
        let scheduler = Scheduler::new(config(slabs, seats, policy));
        let (seen, under_way, log) = (BTreeMap::new(), Vec::new(), Vec::new());
        Self { scheduler, slabs, seats, now_us: 0, seen, under_way, log, next_id: 0 }
    }

    fn note(&mut self, event: Event) {
        self.scheduler.note(self.now_us, event).expect("it did happen");
    }

    /// The session that a number stands for, of those that `are`.
    fn pick(&self, number: usize, are: impl Fn(&Seen) -> bool) -> Option<u64> {
        let ids: Vec<u64> = self.seen.iter().filter(|(_, seen)| are(seen)).map(|(&id, _)| id).collect();
        ids.get(number % ids.len().max(1)).copied()
    }

    fn step(&mut self, step: &Step) -> Checked {
        match *step {
            Step::Create => {
                let id = self.next_id;
                self.next_id += 1;
                let (phase, place, size) = (Phase::Waiting, Place::Away, Size::default());
                self.seen.insert(id, Seen { phase, place, size, is_moving: false, blocked_until_us: 0 });
                self.note(Event::Created { id });
            }
            Step::Ready(number, slack_us) => {
                if let Some(id) = self.pick(number, |seen| seen.phase == Phase::Waiting) {
                    let deadline_us = slack_us.map(|us| self.now_us + us);
                    let seen = self.seen.get_mut(&id).expect("known");
                    let due_us = deadline_us.unwrap_or(self.now_us + PATIENCE_US);
                    seen.phase = Phase::Ready { since_us: self.now_us, deadline_us: due_us };
                    self.note(Event::Ready { id, deadline_us });
                }
            }
            Step::Pause(number, eta_us, tokens) => {
                if let Some(id) = self.pick(number, |seen| seen.phase == Phase::Running) {
                    let seen = self.seen.get_mut(&id).expect("known");
                    seen.phase = Phase::Waiting;
                    seen.size.tokens += tokens;
                    seen.size.bytes = seen.size.tokens * TOKEN_BYTES;
                    // Written through, now and then.
                    if tokens % 3 > 0 {
                        seen.size.host_bytes = seen.size.bytes;
                    }
                    seen.size.dirty_bytes = seen.size.bytes - seen.size.host_bytes;
                    let size = seen.size;
                    self.note(Event::Sized { id, size });
                    self.note(Event::Paused { id, eta_us });
                }
            }
            Step::Finish(number) => {
                let is_still = |seen: &Seen| {
                    seen.phase == Phase::Running || seen.phase == Phase::Waiting && !seen.is_moving
                };
                if let Some(id) = self.pick(number, |seen| is_still(seen) && seen.place != Place::Arriving) {
                    self.seen.remove(&id);
                    self.note(Event::Finished { id });
                }
            }
            Step::End(number, well) => self.end(number, well),
            Step::HostIsShort => {
                if let Some(decision) = self.scheduler.give_way(u64::MAX) {
                    self.carry_out(decision)?;
                }
            }
            Step::Pass(us) => self.now_us += us,
        }
        self.decide()
    }

    fn end(&mut self, number: usize, well: bool) {
        if self.under_way.is_empty() {
            return;
        }
        let decision = self.under_way.swap_remove(number % self.under_way.len());
        let id = id_of(decision);
        let seen = self.seen.get_mut(&id).expect("known");
        match decision {
            Decision::Restore(_) | Decision::Recompute(_) if well => seen.place = Place::Seated,
            Decision::Restore(_) | Decision::Recompute(_) => seen.place = Place::Away,
            Decision::Spill(_) if well => seen.size.disk_bytes = std::mem::take(&mut seen.size.host_bytes),
            Decision::Unspill(_) if well => seen.size.host_bytes = std::mem::take(&mut seen.size.disk_bytes),
            _ => {}
        }
        seen.is_moving = false;
        seen.blocked_until_us = if well { 0 } else { self.now_us + RETRY_US };
        let size = seen.size;
        self.note(Event::Sized { id, size });
        self.note(if well { Event::Done(decision) } else { Event::Failed(decision) });
    }

    fn decide(&mut self) -> Checked {
        for count in 0.. {
            prop_assert!(count < 1000, "it decides for ever");
            let Some(decision) = self.scheduler.next(self.now_us) else { break };
            self.carry_out(decision)?;
        }
        prop_assert_eq!(self.scheduler.sessions(), self.seen.len(), "a session is lost");
        prop_assert_eq!(
            self.scheduler.free_slabs(),
            self.slabs - self.count(|seen| seen.place != Place::Away)
        );
        self.nobody_is_left_out()
    }

    fn count(&self, which: impl Fn(&Seen) -> bool) -> usize {
        self.seen.values().filter(|seen| which(seen)).count()
    }

    fn carry_out(&mut self, decision: Decision) -> Checked {
        self.log.push(decision);
        self.starves_nobody(decision)?;
        let id = id_of(decision);
        let before = self.seen.get(&id).cloned();
        let Some(before) = before else { return Err(TestCaseError::fail(format!("{decision:?} of nobody"))) };
        prop_assert!(!before.is_moving, "{decision:?} of one that is between host and disk");
        let seen = self.seen.get_mut(&id).expect("known");
        match decision {
            Decision::Run(_) => {
                let is_ready = matches!(before.phase, Phase::Ready { .. });
                prop_assert!(is_ready && before.place == Place::Seated, "it is not ready on the device");
                seen.phase = Phase::Running;
            }
            Decision::Restore(_) | Decision::Recompute(_) => {
                prop_assert_eq!(before.place, Place::Away);
                let stored = before.size.host_bytes;
                prop_assert_eq!(before.size.disk_bytes, 0, "it is on disk still");
                let is_copied = matches!(decision, Decision::Restore(_));
                prop_assert_eq!(stored == before.size.bytes, is_copied, "{:?} of {:?}", decision, before);
                seen.place = Place::Arriving;
                seen.size.host_bytes = before.size.bytes;
                seen.size.dirty_bytes = 0;
                let size = seen.size;
                self.note(Event::Sized { id, size });
                self.under_way.push(decision);
            }
            Decision::Evict(_) | Decision::Discard(_) => {
                prop_assert_eq!(before.phase, Phase::Waiting, "it computes or is about to");
                prop_assert!(before.place != Place::Arriving, "it is on its way");
                seen.place = Place::Away;
                seen.size.dirty_bytes = 0;
                let is_evicted = matches!(decision, Decision::Evict(_));
                seen.size.host_bytes = if is_evicted { seen.size.bytes } else { 0 };
                let size = seen.size;
                self.note(Event::Sized { id, size });
            }
            Decision::Spill(_) | Decision::Unspill(_) => {
                prop_assert_eq!(before.place, Place::Away);
                let is_there = matches!(decision, Decision::Spill(_)) == (before.size.host_bytes > 0);
                prop_assert!(is_there && before.size.bytes > 0, "{:?} of {:?}", decision, before);
                seen.is_moving = true;
                self.under_way.push(decision);
            }
            Decision::DropHostCopy(_) => {
                prop_assert_eq!(before.place, Place::Seated, "its only copy");
                seen.size.host_bytes = 0;
                seen.size.dirty_bytes = seen.size.bytes;
                let size = seen.size;
                self.note(Event::Sized { id, size });
            }
        }
        prop_assert!(self.count(|seen| seen.place != Place::Away) <= self.slabs, "over capacity");
        prop_assert!(self.count(|seen| seen.phase == Phase::Running) <= self.seats, "over the seats");
        Ok(())
    }

    /// The bound: who became ready more than `PATIENCE_US` later never goes first on the same way.
    fn starves_nobody(&self, decision: Decision) -> Checked {
        let Some(Seen { phase: Phase::Ready { since_us: own_us, .. }, size: own, .. }) =
            self.seen.get(&id_of(decision))
        else {
            return Ok(());
        };
        let overtaken = |at: fn(&Seen) -> bool| {
            self.seen.iter().find(|(_, seen)| {
                let is_ready =
                    matches!(seen.phase, Phase::Ready { since_us, .. } if since_us + PATIENCE_US < *own_us);
                is_ready && !seen.is_moving && seen.blocked_until_us <= self.now_us && at(seen)
            })
        };
        let older = match decision {
            Decision::Run(_) => overtaken(|seen| seen.place == Place::Seated),
            Decision::Restore(_) | Decision::Recompute(_) if own.tokens > 0 => overtaken(|seen| {
                seen.place == Place::Away && seen.size.disk_bytes == 0 && seen.size.tokens > 0
            }),
            Decision::Restore(_) => overtaken(|seen| seen.place == Place::Away && seen.size.disk_bytes == 0),
            Decision::Unspill(_) => overtaken(|seen| seen.size.disk_bytes > 0),
            _ => None,
        };
        prop_assert!(older.is_none(), "{:?} starves {:?}", decision, older);
        if let (Decision::Run(id), Some(older)) = (decision, overtaken(|seen| seen.place == Place::Arriving))
        {
            let deadline = |seen: &Seen| match seen.phase {
                Phase::Ready { deadline_us, .. } => deadline_us,
                _ => u64::MAX,
            };
            let own_us = deadline(&self.seen[&id]);
            let kept =
                self.count(|seen| seen.place == Place::Arriving && deadline(seen) < own_us.min(self.now_us));
            let free = self.seats - self.count(|seen| seen.phase == Phase::Running);
            prop_assert!(kept < free, "{:?} takes the seat of {:?}", decision, older);
        }
        Ok(())
    }

    /// When it has nothing more to decide, nobody who is ready stands in front of a free seat or slab.
    fn nobody_is_left_out(&self) -> Checked {
        let running = self.count(|seen| seen.phase == Phase::Running);
        let is_ready = |seen: &Seen| matches!(seen.phase, Phase::Ready { .. });
        let coming = self.count(|seen| is_ready(seen) && seen.place == Place::Arriving);
        let seated = self.count(|seen| is_ready(seen) && seen.place == Place::Seated);
        prop_assert!(seated == 0 || running + coming >= self.seats, "a free seat, and somebody to sit there");
        let arriving = self.count(|seen| seen.place == Place::Arriving);
        let away = self.count(|seen| {
            is_ready(seen)
                && seen.place == Place::Away
                && seen.size.disk_bytes == 0
                && !seen.is_moving
                && seen.blocked_until_us <= self.now_us
        });
        let free = self.slabs - self.count(|seen| seen.place != Place::Away);
        prop_assert!(away == 0 || arriving >= 2 || free == 0, "a free slab, and somebody to take it");
        Ok(())
    }
}

fn id_of(decision: Decision) -> u64 {
    let (Decision::Run(id)
    | Decision::Restore(id)
    | Decision::Recompute(id)
    | Decision::Evict(id)
    | Decision::Discard(id)
    | Decision::Spill(id)
    | Decision::Unspill(id)
    | Decision::DropHostCopy(id)) = decision;
    id
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Never over capacity; no session lost; a running one never leaves; an only copy is never dropped;
    /// nobody starves; and the same history gives the same decisions.
    #[test]
    fn invariants_hold_in_every_history(
        slabs in 1..6_usize,
        seats in 1..5_usize,
        policy in policy(),
        steps in prop::collection::vec(step(), 1..150),
    ) {
        let mut first = Executor::new(slabs, seats, policy);
        let mut second = Executor::new(slabs, seats, policy);
        for step in &steps {
            first.step(step)?;
            second.step(step)?;
        }
        prop_assert_eq!(first.log, second.log);
    }
}

/// Who is away before its turn takes another's slab to come back, and so on round the ring.
#[test]
fn of_those_that_said_when_the_last_one_leaves_clean_or_not() {
    let mut scheduler = Scheduler::new(config(2, 2, Policy::DJINN));
    let bytes = 10 * TOKEN_BYTES;
    for (id, dirty_bytes, eta_us) in [(1, 0, 5_000), (2, bytes, 50_000)] {
        let size = Size { tokens: 10, bytes, dirty_bytes, host_bytes: bytes - dirty_bytes, disk_bytes: 0 };
        let pause = Event::Paused { id, eta_us: Some(eta_us) };
        for event in [Event::Created { id }, Event::Seated { id }, Event::Sized { id, size }, pause] {
            scheduler.note(0, event).expect("possible");
        }
    }
    scheduler.note(0, Event::Created { id: 3 }).expect("possible");
    let leaves = scheduler.demand(0, 3).expect("has room").expect("makes room");
    assert_eq!(id_of(leaves), 2, "{leaves:?}");
}

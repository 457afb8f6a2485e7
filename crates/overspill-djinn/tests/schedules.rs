//! Sessions under thousands of seeded schedules, with bugs planted below and above the pool.
//!
//! Each schedule steps, pauses, resumes, evicts, restores, spills, forks, abandons and ends a few
//! sessions at random, on a device that interleaves copies and compute at random; every token is
//! compared with the twin's. A failure names the device's seed and the schedule.

mod common;

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex},
};

use common::{GEOMETRY, Rig, Twin, embed, spill_file};
use overspill_device::{Stream, sim::Planted};
use overspill_djinn::{Error, Pool, PoolConfig, Refusal};
use overspill_engine::storage::Fault;

const SCHEDULES_A_DEVICE: u64 = 20;
const OPERATIONS: usize = 40;

/// A mistake of the pool's caller, to be seen found.
#[derive(Clone, Copy, PartialEq)]
enum Mistake {
    None,
    /// Computes on a layer without waiting for it.
    NoTouch,
    /// Says that a layer was written before it is.
    WroteEarly,
}

/// A session as the schedule knows it.
#[derive(Clone, Default)]
struct Known {
    twin: Twin,
    tokens: usize,
    paused: Option<Standing>,
}

/// Within a step: which token, after which layer, with what hidden state.
#[derive(Clone)]
struct Standing {
    token: u64,
    layer: usize,
    hidden: Arc<Mutex<u64>>,
    steer: Option<(usize, u64)>,
}

struct Run<'a> {
    rig: &'a Rig,
    pool: Pool,
    rng: fastrand::Rng,
    known: BTreeMap<u64, Known>,
    /// What came out, and what should have.
    results: Vec<(u64, Arc<Mutex<u64>>, u64)>,
    next_id: u64,
    mistake: Mistake,
    full: usize,
}

impl Run<'_> {
    fn operate(&mut self) -> Result<(), Error> {
        let ids: Vec<u64> = self.known.keys().copied().collect();
        let Some(&id) = ids.get(self.rng.usize(..ids.len().max(1))) else { return self.create() };
        match self.rng.u8(..23) {
            0 if ids.len() < 4 => self.create(),
            1..=9 => self.step(id),
            10..=12 => self.at_rest(id, Pool::evict),
            13 => self.pool.restore(id),
            14 if self.rig.spill.is_some() => {
                self.at_rest(id, |pool, id| pool.evict(id).and_then(|()| pool.spill(id)))
            }
            15 if self.pool.slab_of(id).is_some() => self.pool.drop_host_copy(id),
            16 if ids.len() < 4 => self.fork(id),
            17 if ids.len() > 1 => {
                self.known.remove(&id);
                self.pool.remove(id)
            }
            18 => {
                let eta_us = self.rng.f64() * 1e3;
                self.at_rest(id, |pool, id| pool.expect(id, eta_us))
            }
            19 => self.pool.tick(500.0).map(|_| ()),
            20 => self.at_rest(id, |pool, id| pool.ask(id, 100)),
            21 => self.pool.turns().map(|_| ()),
            22 => self.pool.end_turn(id),
            _ => Ok(()),
        }
    }

    /// What is refused to a session that has a turn.
    fn at_rest(
        &mut self,
        id: u64,
        how: impl FnOnce(&mut Pool, u64) -> Result<(), Error>,
    ) -> Result<(), Error> {
        match how(&mut self.pool, id) {
            Err(Error::Refused { refusal: Refusal::Running, .. }) => Ok(()),
            other => other,
        }
    }

    fn create(&mut self) -> Result<(), Error> {
        self.next_id += 1;
        self.known.insert(self.next_id, Known::default());
        self.pool.create(self.next_id)
    }

    fn fork(&mut self, id: u64) -> Result<(), Error> {
        let child = self.next_id + 1;
        self.pool.fork(id, child)?;
        self.next_id = child;
        let mut known = self.known[&id].clone();
        if let Some(standing) = &mut known.paused {
            // The hidden state is copied as the edge copies it: behind the compute that makes it.
            self.rig.compute.synchronize()?;
            let hidden = *standing.hidden.lock().expect("not poisoned");
            standing.hidden = Arc::new(Mutex::new(hidden));
        }
        self.known.insert(child, known);
        Ok(())
    }

    /// Starts a step or resumes one, to its end, to a pause, or to an abandoned try.
    fn step(&mut self, id: u64) -> Result<(), Error> {
        let known = &self.known[&id];
        if known.tokens == GEOMETRY.tokens {
            return Ok(());
        }
        let position = known.tokens;
        let begun = self.pool.begin(id)?;
        let mut at = match &known.paused {
            Some(standing) => standing.clone(),
            None => {
                let token = self.rng.u64(..);
                let hidden = Arc::new(Mutex::new(embed(token, position)));
                let steer = self.rng.bool().then(|| (self.rng.usize(..GEOMETRY.layers), self.rng.u64(..)));
                Standing { token, layer: usize::MAX, hidden, steer }
            }
        };
        assert_eq!(begun.pause.unwrap_or(usize::MAX), at.layer, "the pool knows where it stands");
        let first = at.layer.wrapping_add(1);
        let gives_up = self.rng.u8(..12) == 0;
        if gives_up {
            at.hidden = Arc::new(Mutex::new(7));
        }
        let stop = self.rng.usize(first..GEOMETRY.layers * 2 + 1);
        for layer in first..GEOMETRY.layers {
            if self.mistake != Mistake::NoTouch {
                self.pool.touch(id, layer, &self.rig.stream())?;
            }
            if self.mistake == Mistake::WroteEarly {
                self.pool.wrote(id, layer, position + 1, &self.rig.stream())?;
            }
            self.rig.launch(begun.slab, layer, position, &at.hidden);
            self.steer(&at, layer);
            self.pool.wrote(id, layer, position + 1, &self.rig.stream())?;
            if layer == stop {
                if gives_up {
                    return self.pool.abandon(id, &self.rig.stream());
                }
                self.pool.park(id, Some(layer), &self.rig.stream())?;
                let known = self.known.get_mut(&id).expect("known");
                known.paused = Some(Standing { layer, ..at });
                return Ok(());
            }
        }
        if gives_up {
            return self.pool.abandon(id, &self.rig.stream());
        }
        self.pool.park(id, None, &self.rig.stream())?;
        let known = self.known.get_mut(&id).expect("known");
        let expected = known.twin.step(at.token, position, at.steer);
        known.tokens += 1;
        known.paused = None;
        self.results.push((id, at.hidden, expected));
        Ok(())
    }

    fn steer(&self, at: &Standing, layer: usize) {
        if let Some((_, change)) = at.steer.filter(|(steered, _)| *steered == layer) {
            let hidden = Arc::clone(&at.hidden);
            self.rig.compute.launch(move || *hidden.lock().expect("not poisoned") ^= change);
        }
    }

    /// Compares every token, then ends every session; nothing may be left.
    fn finish(mut self) -> Result<usize, String> {
        self.rig.compute.synchronize().map_err(|error| error.to_string())?;
        for (count, (id, found, expected)) in self.results.iter().enumerate() {
            let found = *found.lock().expect("not poisoned");
            if found != *expected {
                return Err(format!("result {count}, of session {id}, is {found:#x}, not {expected:#x}"));
            }
        }
        for (&id, known) in &self.known {
            let tokens = self.pool.tokens(id).map_err(|error| error.to_string())?;
            let beyond = known.paused.as_ref().map_or(0, |standing| standing.layer + 1);
            let expected: Vec<_> =
                (0..GEOMETRY.layers).map(|l| known.tokens + usize::from(l < beyond)).collect();
            if tokens != expected {
                return Err(format!("session {id} has {tokens:?} tokens, not {expected:?}"));
            }
        }
        for id in self.known.into_keys() {
            self.pool.remove(id).map_err(|error| error.to_string())?;
        }
        self.pool.drain().map_err(|error| error.to_string())?;
        let (slabs, free) = self.pool.slabs();
        let left = (slabs - free, self.pool.host_counters().bytes_in_use, self.pool.disk_bytes());
        if left == (0, 0, 0) { Ok(self.full) } else { Err(format!("left (slabs, host, disk): {left:?}")) }
    }
}

/// One schedule; how often host memory was full, or what was wrong.
fn schedule(rig: &Rig, seed: u64, mistake: Mistake) -> Result<usize, String> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let config = PoolConfig {
        geometry: GEOMETRY,
        write_through: rng.u8(..4) > 0,
        flush_bytes: if rng.bool() { 1 } else { 1 << 20 },
        lag_tokens: rng.usize(0..4),
        tail_tokens: rng.usize(1..8),
    };
    let (known, results) = (BTreeMap::new(), Vec::new());
    let mut run = Run { rig, pool: rig.pool(config), rng, known, results, next_id: 0, mistake, full: 0 };
    for operation in 0..OPERATIONS {
        match run.operate() {
            // Those with a turn may have every slab.
            Ok(()) | Err(Error::NoSlab { .. }) => {}
            Err(error) if error.is_full() || (rig.faulty && is_disk_fault(&error)) => run.full += 1,
            Err(error) => return Err(format!("operation {operation}: {error}")),
        }
    }
    run.finish()
}

fn is_disk_fault(error: &Error) -> bool {
    use overspill_engine::Error::{Checksum, Io};
    matches!(error, Error::Engine(Io { .. } | Checksum { .. }))
}

fn rig(seed: u64, planted: Planted) -> Rig {
    let mut rng = fastrand::Rng::with_seed(seed);
    let spill = rng.bool().then(|| spill_file(|_| None));
    // A session takes 6 pages of host memory and more once it has several pieces.
    Rig::new(seed, rng.usize(1..4), rng.usize(8..60), planted, spill)
}

/// Runs `devices` devices with some schedules each; how often host memory was full.
fn all_right(devices: std::ops::Range<u64>) -> usize {
    let mut full = 0;
    for seed in devices {
        let rig = rig(seed, Planted::Nothing);
        for number in 0..SCHEDULES_A_DEVICE {
            match schedule(&rig, seed * SCHEDULES_A_DEVICE + number, Mistake::None) {
                Ok(count) => full += count,
                Err(error) => panic!("device seed {seed}, schedule {number}: {error}"),
            }
        }
    }
    full
}

#[test]
fn every_schedule_gives_the_twins_tokens_and_leaves_nothing() {
    // 2 x 5,000 schedules, on the two cores that a test machine has.
    let full = std::thread::scope(|scope| {
        let halves = [0..250, 250..500].map(|devices| scope.spawn(|| all_right(devices)));
        halves
            .map(|half| half.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .iter()
            .sum::<usize>()
    });
    assert!(full > 1000, "host memory was full {full} times: the schedules are too easy");
}

/// A disk that is full, writes half, cannot read or flips a bit, once in a while: a typed error, and
/// every token is right in the end.
#[test]
fn disk_faults_lose_nothing() {
    let mut failed = 0;
    for seed in 0..100 {
        let fault =
            [Fault::NoSpace, Fault::ShortWrite, Fault::ReadError, Fault::BitFlip][(seed % 4) as usize];
        let spill = spill_file(move |operation| (operation % 7 == seed % 7).then_some(fault));
        let mut rig = Rig::new(seed, 2, 14, Planted::Nothing, Some(spill));
        rig.faulty = true;
        for number in 0..5 {
            match schedule(&rig, seed * 5 + number, Mistake::None) {
                Ok(count) => failed += count,
                Err(error) => panic!("device seed {seed}, schedule {number}, {fault:?}: {error}"),
            }
        }
    }
    assert!(failed > 200, "only {failed} operations met a fault");
}

/// Of 60 devices, how many show the bug: as a wrong token, an error or a panic.
fn caught(planted: Planted, mistake: Mistake) -> usize {
    let shows = |seed: u64| {
        let rig = rig(seed, planted);
        let runs = |number| schedule(&rig, seed * SCHEDULES_A_DEVICE + number, mistake).is_ok();
        (0..SCHEDULES_A_DEVICE)
            .any(|number| !catch_unwind(AssertUnwindSafe(|| runs(number))).unwrap_or(false))
    };
    (0..60).filter(|&seed| shows(seed)).count()
}

/// Each wait between streams removed alone, and the caller's own mistakes.
#[test]
fn planted_races_are_caught() {
    let by = |by, on| Planted::WaitIgnored { by, on };
    for (name, planted, mistake) in [
        ("store before compute has written", by("offload", "compute"), Mistake::None),
        ("load over what compute still reads", by("onboard", "compute"), Mistake::None),
        ("load of what is not stored yet", by("onboard", "offload"), Mistake::None),
        ("compute before the load", by("compute", "onboard"), Mistake::None),
        ("compute over what is being stored", by("compute", "offload"), Mistake::None),
        ("leases given up early", Planted::EventsPassEarly, Mistake::None),
        ("no waits at all", Planted::StreamWaitsIgnored, Mistake::None),
        ("a layer is not touched", Planted::Nothing, Mistake::NoTouch),
        ("a layer is announced early", Planted::Nothing, Mistake::WroteEarly),
    ] {
        let found = caught(planted, mistake);
        eprintln!("{name}: caught on {found} of 60 devices");
        assert!(found > 0, "{name}: not caught");
    }
}

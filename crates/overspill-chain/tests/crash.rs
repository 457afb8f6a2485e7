//! A crash at any operation of commit and gc: what was committed is there bit for bit, what was not is gone or whole.

#[path = "common/disk.rs"]
mod disk;
#[path = "common/state.rs"]
mod state;

use std::fs;

use disk::Crashing;
use overspill_chain::{Chain, Error, Keep, PARAMS};
use state::{OPTIONS, State};

const STEPS: u64 = 7;
/// Seeds of a normal run; `OVERSPILL_SEEDS` asks for more.
const SEEDS: u64 = 200;

fn quiet(_: u64, _: u64) {}

/// Plays init, commits and a gc until the crash. The states by step, the first `durable` of which were committed before
/// it; whether gc, which keeps every second step, had begun.
fn play(chain: Crashing, seed: u64) -> (Vec<State>, u64, bool) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut states = vec![State::new(&mut random)];
    for _ in 1..STEPS {
        let mut next = states[states.len() - 1].clone();
        next.train(&mut random, 0.15);
        states.push(next);
    }
    let Ok(chain) = Chain::init_in(Box::new(chain), OPTIONS) else { return (states, 0, false) };
    for (step, state) in (0..).zip(&states) {
        if chain.commit(step, &[(PARAMS, &state.checkpoint())], &quiet).is_err() {
            return (states, step, false);
        }
    }
    let _ = chain.gc(Keep { every: Some(2), ..Keep::default() });
    (states, STEPS, true)
}

/// Why what the crash left is wrong.
fn check(folder: &std::path::Path, states: &[State], committed: u64, collecting: bool) -> Result<(), String> {
    let chain = match Chain::open(folder, OPTIONS) {
        Err(Error::NotAChain { .. }) if committed == 0 => Chain::init(folder, OPTIONS),
        opened => opened,
    }
    .map_err(|error| format!("does not open: {error}"))?;
    let steps = chain.steps().map_err(|error| error.to_string())?;
    let wanted = (0..committed).filter(|step| !collecting || step % 2 == 0 || step + 1 == committed);
    if let Some(lost) = wanted.clone().find(|step| !steps.contains(step)) {
        return Err(format!("step {lost} was committed and is lost; there are {steps:?}"));
    }
    if let Some(stranger) = steps.iter().find(|&&step| step > committed) {
        return Err(format!("step {stranger} was never begun"));
    }
    let target = folder.join("restored");
    for &step in &steps {
        chain.restore(step, PARAMS, &target, &quiet).map_err(|error| format!("step {step}: {error}"))?;
        if !states[step as usize].is_in(&target) {
            return Err(format!("step {step} came back as another state"));
        }
    }
    let _ = fs::remove_file(&target);
    // The chain goes on, and a collection leaves nothing of the crash.
    let mut last = states[states.len() - 1].clone();
    last.train(&mut fastrand::Rng::with_seed(1), 0.1);
    chain
        .commit(100, &[(PARAMS, &last.checkpoint())], &quiet)
        .map_err(|error| format!("cannot go on: {error}"))?;
    chain.gc(Keep::default()).map_err(|error| format!("cannot collect: {error}"))?;
    chain.verify(true, &quiet).map_err(|error| format!("unsound: {error}"))?;
    let left = fs::read_dir(folder.join("objects")).map_err(|error| error.to_string())?.count() as u64;
    let needed = chain.verify(false, &quiet).map_err(|error| error.to_string())?.objects;
    if left == needed { Ok(()) } else { Err(format!("{left} objects, {needed} are needed")) }
}

/// One crash. An error is what went wrong.
fn crash(seed: u64, harm: impl Fn(&mut fastrand::Rng, &std::path::Path)) -> Result<(), String> {
    let mut random = fastrand::Rng::with_seed(seed);
    let (running, left) = (tempfile::tempdir().expect("folder"), tempfile::tempdir().expect("folder"));
    let (whole, count) = Crashing::new(&running.path().join("whole"), None);
    // Every plan of a seed has the same operations; the first run counts them.
    play(whole, seed % 8);
    let operations = count.lock().expect("unpoisoned").operations();
    let root = running.path().join("chain");
    let (files, disk) = Crashing::new(&root, Some(random.u64(0..operations)));
    let (states, committed, collecting) = play(files, seed % 8);
    disk.lock().expect("unpoisoned").leave(&root, left.path(), &mut random);
    harm(&mut random, left.path());
    check(left.path(), &states, committed, collecting)
}

#[test]
fn what_was_committed_survives_a_crash_at_any_operation() {
    let seeds = std::env::var("OVERSPILL_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(SEEDS);
    for seed in 0..seeds {
        if let Err(wrong) = crash(seed, |_, _| ()) {
            panic!("seed {seed}: {wrong}");
        }
    }
}

/// The checks themselves: an object that is lost or cut after it was flushed is noticed.
#[test]
fn a_disk_that_lies_is_noticed() {
    let lie = |random: &mut fastrand::Rng, folder: &std::path::Path| {
        let objects: Vec<_> = fs::read_dir(folder.join("objects")).expect("listed").flatten().collect();
        if let Some(entry) = random.choice(&objects) {
            let bytes = fs::read(entry.path()).expect("read");
            fs::write(entry.path(), &bytes[..bytes.len() / 2]).expect("written");
        }
    };
    let noticed = (0..40).filter(|&seed| crash(seed, lie).is_err()).count();
    assert!(noticed > 20, "{noticed} of 40");
}

//! A chain from outside: every step comes back, roles change, other writers and strangers are refused.

#[path = "common/state.rs"]
mod state;

use std::fs;

use overspill_chain::{Chain, Error, Keep, PARAMS, Role};
use overspill_tpde::Options;
use state::{OPTIONS, State};

fn quiet(_: u64, _: u64) {}

/// A chain of `count` steps whose states drift, and the states.
fn drifting(folder: &std::path::Path, seed: u64, count: u64) -> (Chain, Vec<State>) {
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let chain = Chain::init(folder, OPTIONS).expect("made");
    let mut state = State::new(&mut random);
    let mut states = Vec::new();
    for step in 0..count {
        state.train(&mut random, 0.04);
        chain.commit(step * 10, &[(PARAMS, &state.checkpoint())], &quiet).expect("committed");
        states.push(state.clone());
    }
    (chain, states)
}

fn restores(chain: &Chain, step: u64, state: &State) -> bool {
    let folder = tempfile::tempdir().expect("folder");
    let target = folder.path().join("restored.safetensors");
    chain.restore(step, PARAMS, &target, &quiet).expect("restored");
    let same = state.is_in(&target);
    fs::remove_file(&target).expect("removed");
    assert_eq!(fs::read_dir(folder.path()).expect("listed").count(), 0, "nothing else is left there");
    same
}

#[test]
fn every_step_comes_back_with_and_without_the_cache() {
    let folder = tempfile::tempdir().expect("folder");
    let (chain, states) = drifting(&folder.path().join("chain"), 1, 40);
    let log = chain.log().expect("read");
    let roles: Vec<Role> = log.iter().map(|record| record.parts[PARAMS].role).collect();
    assert_eq!(roles[0], Role::Keyframe);
    assert!(roles[1..].contains(&Role::Anchor), "{roles:?}");
    for round in 0..2 {
        for (i, state) in states.iter().enumerate() {
            assert!(restores(&chain, i as u64 * 10, state), "round {round}, step {}", i * 10);
        }
        fs::remove_dir_all(folder.path().join("chain/cache")).expect("removed");
        fs::create_dir(folder.path().join("chain/cache")).expect("made");
    }
    // With less memory than a state needs, the anchor passes through a file.
    let tight =
        Chain::open(&folder.path().join("chain"), Options { memory_bytes: 1000, threads: 1 }).expect("opens");
    assert!(restores(&tight, 390, &states[39]));
    let verified = chain.verify(true, &quiet).expect("sound");
    assert_eq!(verified.steps, 40);
    assert!(log.iter().all(|record| record.parts[PARAMS].objects().count() <= 3), "two applications at most");
}

#[test]
fn a_cached_state_that_is_wrong_is_noticed() {
    let folder = tempfile::tempdir().expect("folder");
    let (chain, mut states) = drifting(&folder.path().join("chain"), 2, 30);
    let cached: Vec<_> = fs::read_dir(folder.path().join("chain/cache")).expect("listed").flatten().collect();
    assert!(!cached.is_empty());
    for entry in &cached {
        let mut bytes = fs::read(entry.path()).expect("read");
        *bytes.last_mut().expect("long") ^= 1;
        fs::write(entry.path(), bytes).expect("written");
    }
    assert!(restores(&chain, 290, &states[29]));
    let mut state = states.pop().expect("30");
    state.train(&mut fastrand::Rng::with_seed(3), 0.04);
    chain.commit(300, &[(PARAMS, &state.checkpoint())], &quiet).expect("committed");
    assert!(restores(&chain, 300, &state));
}

#[test]
fn steps_are_dropped_and_the_rest_comes_back() {
    let folder = tempfile::tempdir().expect("folder");
    let (chain, states) = drifting(&folder.path().join("chain"), 4, 30);
    let collected = chain.gc(Keep { last: Some(2), every: Some(100), up_to: Some(250) }).expect("collected");
    assert_eq!(chain.steps().expect("read"), [0, 100, 200, 240, 250]);
    assert_eq!(collected.steps.len(), 25);
    for step in chain.steps().expect("read") {
        assert!(restores(&chain, step, &states[step as usize / 10]), "step {step}");
    }
    chain.verify(true, &quiet).expect("sound");
    // The run goes on from where it was taken up.
    chain.commit(260, &[(PARAMS, &states[26].checkpoint())], &quiet).expect("committed");
    assert!(restores(&chain, 260, &states[26]));
}

#[test]
fn a_step_is_committed_once() {
    let folder = tempfile::tempdir().expect("folder");
    let (chain, states) = drifting(&folder.path().join("chain"), 5, 3);
    let again = chain.commit(10, &[(PARAMS, &states[1].checkpoint())], &quiet).expect("the same state");
    assert_eq!(again, chain.record(10).expect("read"));
    let other = chain.commit(10, &[(PARAMS, &states[2].checkpoint())], &quiet).expect_err("another state");
    assert!(other.to_string().contains("step 10"), "{other}");
    let between = chain.commit(15, &[(PARAMS, &states[2].checkpoint())], &quiet).expect_err("out of order");
    assert!(between.to_string().contains("after step 20"), "{between}");
    assert!(matches!(chain.record(11), Err(Error::NoStep { step: 11, .. })));
}

#[test]
fn parts_have_chains_of_their_own() {
    let folder = tempfile::tempdir().expect("folder");
    println!("seed 6");
    let mut random = fastrand::Rng::with_seed(6);
    let chain = Chain::init(&folder.path().join("chain"), OPTIONS).expect("made");
    let (mut params, mut moments) = (State::new(&mut random), State::new(&mut random));
    for step in 0..5 {
        params.train(&mut random, 0.02);
        moments.train(&mut random, 0.9);
        let parts = [(PARAMS, &params.checkpoint()), ("moments", &moments.checkpoint())];
        chain.commit(step, &parts, &quiet).expect("committed");
    }
    let target = folder.path().join("moments.safetensors");
    chain.restore(4, "moments", &target, &quiet).expect("restored");
    assert!(moments.is_in(&target));
    assert!(restores(&chain, 4, &params));
    let missing = chain.restore(4, "optimizer", &target, &quiet).expect_err("no such part");
    assert!(missing.to_string().contains("params, moments"), "{missing}");
}

#[test]
fn a_second_writer_is_told_who_writes() {
    let folder = tempfile::tempdir().expect("folder");
    let (chain, states) = drifting(&folder.path().join("chain"), 7, 1);
    let held = fs::File::open(folder.path().join("chain/lock")).expect("there");
    rustix::fs::flock(&held, rustix::fs::FlockOperation::NonBlockingLockExclusive).expect("free");
    let refused = chain.commit(10, &[(PARAMS, &states[0].checkpoint())], &quiet).expect_err("locked");
    assert!(refused.to_string().contains("written to by process"), "{refused}");
    drop(held);
    chain.commit(10, &[(PARAMS, &states[0].checkpoint())], &quiet).expect("the lock ended with its holder");
}

#[test]
fn strangers_are_refused_and_damage_is_named() {
    let folder = tempfile::tempdir().expect("folder");
    assert!(matches!(Chain::open(folder.path(), OPTIONS), Err(Error::NotAChain { .. })));
    fs::write(folder.path().join("thesis.tex"), "dear reader").expect("written");
    assert!(Chain::init(folder.path(), OPTIONS).is_err());
    let (chain, _) = drifting(&folder.path().join("chain"), 8, 4);
    assert!(Chain::init(&folder.path().join("chain"), OPTIONS).is_err(), "twice");
    let objects = folder.path().join("chain/objects");
    for entry in fs::read_dir(&objects).expect("listed").flatten() {
        let whole = fs::read(entry.path()).expect("read");
        let mut damaged = whole.clone();
        damaged[whole.len() / 2] ^= 4;
        fs::write(entry.path(), &damaged).expect("written");
        let error = chain.verify(false, &quiet).expect_err("damaged").to_string();
        assert!(error.contains(&*entry.file_name().to_string_lossy()), "{error}");
        fs::write(entry.path(), &whole).expect("written");
    }
    let record = folder.path().join(format!("chain/steps/{:020}.json", 20));
    let text = fs::read_to_string(&record).expect("read");
    fs::write(&record, text.replacen("20", "21", 1)).expect("written");
    assert!(matches!(chain.log(), Err(Error::Damaged { .. })));
}

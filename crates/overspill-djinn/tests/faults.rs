//! What is refused, and that it changes nothing.

mod common;

use common::{CONFIG, GEOMETRY, Rig, Twin, spill_file, step};
use overspill_device::sim::Planted;
use overspill_djinn::{Error, Refusal};
use overspill_engine::{Error as EngineError, Tier, storage::Fault};

fn refusal(outcome: Result<impl Sized, Error>) -> Refusal {
    match outcome.err().expect("refused") {
        Error::Refused { refusal, .. } => refusal,
        other => panic!("{other}"),
    }
}

#[test]
fn calls_out_of_order_are_refused() {
    let rig = Rig::new(1, 1, 40, Planted::Nothing, None);
    let mut pool = rig.pool(CONFIG);
    assert!(matches!(pool.begin(9), Err(Error::Unknown { id: 9 })));
    pool.create(1).expect("new");
    pool.create(2).expect("new");
    assert!(matches!(pool.create(1), Err(Error::Exists { id: 1 })));
    pool.begin(1).expect("room");
    assert_eq!(refusal(pool.begin(1)), Refusal::Running, "two resumes of one session");
    assert_eq!(refusal(pool.evict(1)), Refusal::Running);
    assert_eq!(refusal(pool.remove(1)), Refusal::Running);
    assert_eq!(refusal(pool.fork(1, 3)), Refusal::Running);
    assert!(matches!(pool.begin(2), Err(Error::NoSlab { slabs: 1 })));
    let long = pool.wrote(1, 0, GEOMETRY.tokens + 1, &rig.stream());
    assert!(matches!(long, Err(Error::TooLong { limit_tokens: 12, .. })));
    pool.park(1, None, &rig.stream()).expect("running");
    assert_eq!(refusal(pool.park(1, None, &rig.stream())), Refusal::NotRunning);
    pool.remove(1).expect("parked");
    assert!(matches!(pool.park(1, None, &rig.stream()), Err(Error::Unknown { id: 1 })));
    let mut twin = Twin::default();
    assert_eq!(step(&rig, &mut pool, 2, 5), twin.step(5, 0, None), "the other one is unharmed");
}

#[test]
fn without_host_memory_a_session_stays_and_the_next_one_is_refused() {
    let rig = Rig::new(2, 1, 2, Planted::Nothing, None);
    let mut pool = rig.pool(CONFIG);
    let mut twin = Twin::default();
    pool.create(1).expect("new");
    pool.create(2).expect("new");
    assert_eq!(step(&rig, &mut pool, 1, 5), twin.step(5, 0, None));
    let full = |outcome: Result<(), Error>| match outcome {
        Err(Error::Engine(EngineError::Full { tier, .. })) => assert_eq!(tier, Tier::Host),
        other => panic!("{other:?}"),
    };
    full(pool.evict(1));
    full(pool.begin(2).map(|_| ()));
    assert_eq!(step(&rig, &mut pool, 1, 6), twin.step(6, 1, None), "it is where it was");
}

#[test]
fn a_flipped_bit_on_disk_is_found_and_the_session_stays_there() {
    let flips = std::sync::atomic::AtomicBool::new(true);
    let spill = spill_file(move |operation| {
        // Six writes, then the first read.
        (operation >= 6 && flips.swap(false, std::sync::atomic::Ordering::Relaxed)).then_some(Fault::BitFlip)
    });
    let rig = Rig::new(3, 1, 40, Planted::Nothing, Some(spill));
    let mut pool = rig.pool(CONFIG);
    let mut twin = Twin::default();
    pool.create(1).expect("new");
    assert_eq!(step(&rig, &mut pool, 1, 5), twin.step(5, 0, None));
    pool.evict(1).expect("room");
    pool.spill(1).expect("room on disk");
    assert_eq!(pool.copy_bytes(1).expect("known").0, 0);
    let damaged = pool.begin(1).expect_err("damaged");
    assert!(matches!(damaged, Error::Engine(EngineError::Checksum { .. })), "{damaged}");
    assert_eq!(step(&rig, &mut pool, 1, 6), twin.step(6, 1, None), "the second read is right");
}

#[test]
fn a_saved_session_comes_back_and_a_damaged_one_does_not() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = folder.path().join("session");
    let rig = Rig::new(4, 2, 80, Planted::Nothing, Some(spill_file(|_| None)));
    let mut pool = rig.pool(CONFIG);
    let mut twin = Twin::default();
    pool.create(1).expect("new");
    for token in 0..3 {
        assert_eq!(step(&rig, &mut pool, 1, token), twin.step(token, token as usize, None));
    }
    pool.save(1, &path, "a record").expect("written");
    assert_eq!(pool.load(2, &path).expect("whole"), "a record");
    pool.remove(1).expect("parked");
    assert_eq!(step(&rig, &mut pool, 2, 9), twin.clone().step(9, 3, None));
    pool.evict(2).expect("room");
    pool.spill(2).expect("room on disk");
    pool.save(2, &path, "from disk").expect("written");
    pool.load(3, &path).expect("whole");
    twin.step(9, 3, None);
    assert_eq!(step(&rig, &mut pool, 3, 10), twin.step(10, 4, None));

    let whole = std::fs::read(&path).expect("read");
    let mut rng = fastrand::Rng::with_seed(5);
    let in_use = pool.host_counters().bytes_in_use;
    for number in 0..300 {
        let mut bytes = whole.clone();
        let at = rng.usize(..bytes.len());
        if number % 2 == 0 {
            bytes.truncate(at);
        } else {
            bytes[at] ^= 1 << rng.u8(..8);
        }
        std::fs::write(&path, &bytes).expect("written");
        let refused = pool.load(100, &path).expect_err("damaged");
        assert!(matches!(refused, Error::Damaged { .. }), "{number}, at {at}: {refused}");
        assert_eq!(pool.host_counters().bytes_in_use, in_use, "{number}: memory was left behind");
    }
    assert!(matches!(pool.load(100, &folder.path().join("none")), Err(Error::File { .. })));
    assert!(matches!(pool.save(3, &folder.path().join("no/folder"), ""), Err(Error::File { .. })));
}

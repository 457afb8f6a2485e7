//! Turns: who asked is brought and told, and keeps its slab until it has ended.

mod common;

use common::{CONFIG, Rig, Twin, step};
use overspill_device::sim::Planted;
use overspill_djinn::{Error, Pool, Refusal, Residency};

/// A pool of `slabs` with `sessions`, each of which has taken a step; and what each has to give in the next.
fn started(rig: &Rig, sessions: u64) -> (Pool, Vec<Twin>) {
    let mut pool = rig.pool(CONFIG);
    let twins = (1..=sessions).map(|id| {
        let mut twin = Twin::default();
        pool.create(id).expect("new");
        assert_eq!(step(rig, &mut pool, id, id), twin.step(id, 0, None));
        twin
    });
    let twins = twins.collect();
    (pool, twins)
}

/// Whose turn it is once all copies have ended.
fn turns(pool: &mut Pool) -> Vec<u64> {
    let mut found = pool.turns().expect("healthy");
    pool.drain().expect("healthy");
    found.extend(pool.turns().expect("healthy"));
    found
}

#[test]
fn who_asks_is_brought_and_then_nobody_takes_its_slab() {
    let rig = Rig::new(3, 2, 40, Planted::Nothing, None);
    let (mut pool, mut twins) = started(&rig, 4);
    assert_eq!(pool.residency(1).expect("known"), Residency::Away);
    pool.ask(1, 0).expect("at rest");
    assert_eq!(turns(&mut pool), [1]);
    assert_eq!(pool.residency(1).expect("known"), Residency::Resident);
    // Between its forwards others come and go through the other slab, however long it was not used.
    for id in [2, 3, 4, 2, 3, 4] {
        let position = pool.tokens(id).expect("known")[0];
        assert_eq!(step(&rig, &mut pool, id, 9), twins[id as usize - 1].step(9, position, None));
        assert_eq!(pool.residency(1).expect("known"), Residency::Resident, "after a step of {id}");
    }
    assert_eq!(step(&rig, &mut pool, 1, 7), twins[0].step(7, 1, None));
    pool.begin(2).expect("room");
    assert!(matches!(pool.begin(3), Err(Error::NoSlab { slabs: 2 })));
    pool.end_turn(1).expect("known");
    pool.begin(3).expect("the slab that it gave back");
    assert_eq!(pool.residency(1).expect("known"), Residency::Away);
    for id in [2, 3] {
        pool.abandon(id, &rig.stream()).expect("running");
    }
}

#[test]
fn more_turns_than_slabs_come_one_after_the_other() {
    let rig = Rig::new(4, 2, 40, Planted::Nothing, None);
    let (mut pool, mut twins) = started(&rig, 5);
    for id in [5, 2, 1, 4, 3] {
        pool.ask(id, 1000 * id).expect("at rest");
    }
    let (mut had, mut all) = (Vec::new(), turns(&mut pool));
    assert_eq!(all.len(), 2, "{all:?}");
    while let Some(id) = all.pop() {
        assert_eq!(step(&rig, &mut pool, id, 7), twins[id as usize - 1].step(7, 1, None));
        pool.end_turn(id).expect("known");
        had.push(id);
        all.extend(turns(&mut pool));
    }
    had.sort_unstable();
    assert_eq!(had, [1, 2, 3, 4, 5]);
}

#[test]
fn the_one_that_is_due_first_comes_first() {
    let rig = Rig::new(5, 1, 40, Planted::Nothing, None);
    let (mut pool, _) = started(&rig, 4);
    for (id, due_us) in [(1, 30), (2, 10), (3, 20)] {
        pool.ask(id, due_us * 1_000_000).expect("at rest");
    }
    let mut order = Vec::new();
    for _ in 0..3 {
        let found = turns(&mut pool);
        assert_eq!(found.len(), 1, "{found:?}");
        pool.end_turn(found[0]).expect("known");
        order.extend(found);
    }
    assert_eq!(order, [2, 3, 1]);
}

#[test]
fn a_turn_that_is_taken_back_is_nobodys() {
    let rig = Rig::new(6, 1, 40, Planted::Nothing, None);
    let (mut pool, mut twins) = started(&rig, 2);
    pool.ask(1, 0).expect("at rest");
    let refused = |outcome| matches!(outcome, Err(Error::Refused { refusal: Refusal::Running, .. }));
    assert!(refused(pool.ask(1, 0)), "twice");
    assert!(refused(pool.expect(1, 5.0)), "it does not wait");
    pool.end_turn(1).expect("known");
    pool.end_turn(1).expect("twice does nothing");
    assert_eq!(turns(&mut pool), [0; 0]);
    assert_eq!(step(&rig, &mut pool, 2, 5), twins[1].step(5, 1, None));
    pool.ask(2, 0).expect("at rest");
    assert_eq!(turns(&mut pool), [2]);
    assert!(refused(pool.evict(2)));
    assert!(matches!(pool.begin(1), Err(Error::NoSlab { slabs: 1 })));
    pool.remove(2).expect("parked");
    assert_eq!(step(&rig, &mut pool, 1, 5), twins[0].step(5, 1, None));
}

#[test]
fn where_nobody_can_leave_its_own_forward_says_why() {
    let rig = Rig::new(2, 1, 2, Planted::Nothing, None);
    let (mut pool, mut twins) = started(&rig, 1);
    pool.create(2).expect("new");
    pool.ask(2, 0).expect("at rest");
    assert_eq!(turns(&mut pool), [2]);
    assert!(pool.begin(2).is_err_and(|error| error.is_full()), "host memory holds no copy of the first one");
    pool.end_turn(2).expect("known");
    assert_eq!(step(&rig, &mut pool, 1, 6), twins[0].step(6, 1, None), "it is where it was");
}

//! A forward and a backward as the edge would drive them.

use super::*;
use crate::Link;

const LINK: Link = Link { offload_gbps: 1.0, onboard_gbps: 1.0 };

fn planner(budget_bytes: u64) -> Planner {
    Planner::new(
        Limits { budget_bytes, lookahead_bytes: 100, slack_bytes: 0, host_bytes: u64::MAX, link: LINK },
        100,
    )
    .expect("fits")
}

fn sample(allocated_bytes: u64) -> Sample {
    Sample { now_us: 0.0, allocated_bytes, peak_bytes: allocated_bytes }
}

/// A forward over `sizes` and a backward in reverse, with `peak` reported at the end. Those at
/// `rebuilt` have a recipe that reads the unit before them.
fn step(planner: &mut Planner, sizes: &[u64], rebuilt: &[usize], peak: u64) -> Vec<Action> {
    let mut units: Vec<UnitId> = Vec::new();
    let mut actions = Vec::new();
    for (index, &bytes) in sizes.iter().enumerate() {
        let (unit, action) = planner.pack(bytes, sample(100 + planner.held_bytes() + bytes)).expect("fits");
        if rebuilt.contains(&index) && planner.is_exploring() {
            planner.set_recipe(unit, &[units[index - 1]]);
        } else if action == Action::Offload {
            planner.left(unit);
        }
        units.push(unit);
        actions.push(action);
    }
    for &unit in units.iter().rev() {
        planner.need(unit, sample(100 + planner.held_bytes()));
        for ahead in planner.due(Some(unit), 100 + planner.held_bytes()).fetches {
            planner.prefetched(ahead);
        }
        planner.arrived(unit, 0.0);
        planner.free(unit, sample(100 + planner.held_bytes()), || Some(peak));
    }
    assert_eq!(planner.held_bytes(), 0);
    actions
}

fn kept(actions: &[Action]) -> usize {
    actions.iter().filter(|action| **action == Action::Keep).count()
}

#[test]
fn the_first_step_offloads_and_the_second_keeps_what_fits() {
    let mut planner = planner(400);
    assert_eq!(step(&mut planner, &[90; 4], &[], 0), [Action::Offload; 4]);
    let second = step(&mut planner, &[90; 4], &[], 0);
    assert!(second[0] == Action::Offload && second[3] == Action::Keep, "{second:?}");
    assert_eq!(step(&mut planner, &[90; 4], &[], 0), second);
    assert!(!planner.is_recording());
}

#[test]
fn what_has_a_recipe_is_rebuilt_where_it_does_not_fit() {
    let mut planner = planner(400);
    step(&mut planner, &[90; 4], &[1, 3], 0);
    let second = step(&mut planner, &[90; 4], &[1, 3], 0);
    assert!(second.contains(&Action::Rebuild), "{second:?}");
    planner.settle(&[0.0; 12], &[], &[], LINK);
    assert_eq!(step(&mut planner, &[90; 4], &[1, 3], 0), second);
}

#[test]
fn plans_count_on_half_of_the_link_while_it_is_timed() {
    let mut planner = planner(400);
    let mut shares = Vec::new();
    for _ in 0..5 {
        step(&mut planner, &[90; 4], &[], 0);
        planner.settle(&[0.0; 12], &[], &[], LINK);
        shares.push(planner.limits().link.offload_gbps);
    }
    assert_eq!(shares, [0.485, 0.485, 0.97, 0.97, 0.97]);
}

#[test]
fn another_shape_falls_back_to_offloading_and_is_recorded() {
    let mut planner = planner(1000);
    step(&mut planner, &[90; 4], &[], 0);
    step(&mut planner, &[90; 4], &[], 0);
    assert_eq!(step(&mut planner, &[90, 80, 90], &[], 0)[1..], [Action::Offload; 2]);
    assert!(planner.is_exploring());
    step(&mut planner, &[90, 80, 90], &[], 0);
    assert_eq!(step(&mut planner, &[90, 80, 90], &[], 0), [Action::Keep; 3]);
}

#[test]
fn an_overrun_that_no_event_saw_makes_the_next_step_keep_less() {
    let mut planner = planner(600);
    for _ in 0..2 {
        step(&mut planner, &[90; 6], &[], 0);
    }
    let before = kept(&step(&mut planner, &[90; 6], &[], 800));
    assert!(kept(&step(&mut planner, &[90; 6], &[], 0)) < before);
    assert_eq!(planner.peak_bytes(), 800);
}

#[test]
fn what_is_allocated_between_steps_is_taken_off_the_budget() {
    let mut planner = planner(600);
    step(&mut planner, &[90; 4], &[], 0);
    let (unit, _) = planner.pack(90, sample(100 + 300)).expect("fits");
    assert!(planner.plan().is_some_and(|(_, plan)| kept(&plan.actions) < 4));
    planner.free(unit, sample(100), || None);
}

#[test]
fn budgets_that_cannot_be_kept_are_errors_with_their_facts() {
    let limits = *planner(400).limits();
    let Error::Budget { requested_bytes, budget_bytes, .. } =
        Planner::new(limits, 401).expect_err("parameters do not fit");
    assert_eq!((requested_bytes, budget_bytes), (401, 400));
    assert!(planner(400).pack(301, sample(0)).is_err(), "one tensor larger than what is left");
}

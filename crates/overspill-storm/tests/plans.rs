//! Plans against brute force and against what no plan may do.

use overspill_storm::{
    Action, Coded, Event, Limits, Link, Recipe, Shape, Speeds, StepRecord, Unit, make_plan, simulate,
};

/// Forward packs `n` units, backward needs and frees them in reverse.
fn stack(n: usize, bytes: u64) -> StepRecord {
    let events = (0..3 * n).map(|i| Event { time_us: 100.0 * i as f64, other_bytes: 1000 }).collect();
    let unit = |i: usize| Unit {
        needed_at: Some(3 * n - 2 - 2 * i),
        freed_at: Some(3 * n - 1 - 2 * i),
        ..Unit::packed(bytes, i)
    };
    StepRecord { units: (0..n).map(unit).collect(), events, hidden_bytes: 0 }
}

fn limits(budget_bytes: u64) -> Limits {
    Limits {
        budget_bytes,
        lookahead_bytes: 0,
        slack_bytes: 0,
        host_bytes: u64::MAX,
        link: Link { offload_gbps: 1.0, onboard_gbps: 1.0 },
    }
}

/// A random step: sizes and times vary, some units have recipes that read earlier ones.
fn random_step(random: &mut fastrand::Rng, n: usize) -> StepRecord {
    let mut record = stack(n, 0);
    let mut now_us = 0.0;
    for event in &mut record.events {
        now_us += random.f64() * 2.0;
        *event = Event { time_us: now_us, other_bytes: random.u64(500..1000) };
    }
    for index in 0..n {
        let unit = &mut record.units[index];
        unit.bytes = random.u64(100..1000);
        if index > 0 && random.u8(0..3) == 0 {
            let inputs = vec![random.usize(0..index)];
            unit.recipe = Some(Recipe { inputs, cost_us: random.f64() * 0.6 });
        }
        if random.bool() {
            let (encode_us, decode_us) = (random.f64() * 0.1, random.f64() * 0.1);
            unit.coded = Some(Coded { bytes: unit.bytes * random.u64(50..100) / 100, encode_us, decode_us });
        }
    }
    record
}

#[test]
fn keeps_everything_when_it_fits() {
    let record = stack(10, 500);
    let plan = make_plan(&record, &limits(record.keep_all_peak_bytes()));
    assert!(plan.actions.iter().all(|action| *action == Action::Keep));
    assert_eq!(plan.predicted.peak_bytes, record.keep_all_peak_bytes());
    assert_eq!(plan.predicted.stall_us, 0.0);
}

#[test]
fn offloads_the_first_packed_and_stays_within_the_budget() {
    let record = stack(10, 500);
    let plan = make_plan(&record, &limits(1000 + 5 * 500));
    let kept = plan.actions.iter().filter(|action| **action == Action::Keep).count();
    assert!(kept >= 3, "{plan:?}");
    assert!(plan.actions[10 - kept..].iter().all(|action| *action == Action::Keep));
    assert!(plan.predicted.peak_bytes <= 1000 + 5 * 500, "{plan:?}");
    assert_eq!(plan.schedule.fetches.len(), 10 - kept);
}

#[test]
fn a_budget_below_the_rest_keeps_nothing() {
    let plan = make_plan(&stack(3, 500), &limits(10));
    assert!(plan.actions.iter().all(|action| *action == Action::Offload));
}

#[test]
fn an_empty_step_has_an_empty_plan() {
    assert_eq!(make_plan(&StepRecord::default(), &limits(0)).actions, []);
}

#[test]
fn a_rebuilt_unit_needs_its_inputs_when_it_is_needed() {
    let mut record = stack(4, 500);
    record.units[3].recipe = Some(Recipe { inputs: vec![0], cost_us: 1.0 });
    let actions = [Action::Offload, Action::Keep, Action::Keep, Action::Rebuild];
    let (schedule, _) = simulate(&record, &actions, &limits(1 << 20));
    let need = record.units[3].needed_at.expect("needed");
    assert!(schedule.fetches.iter().all(|&(at, unit)| unit == 0 && at <= need), "{schedule:?}");
}

#[test]
fn a_narrow_copy_is_made_only_for_what_is_rebuilt_from_it() {
    let mut record = stack(2, 500);
    record.units[1] = Unit { is_narrow: true, needed_at: None, bytes: 250, ..record.units[1].clone() };
    record.units[0].recipe = Some(Recipe { inputs: vec![1], cost_us: 1.0 });
    let roomy = make_plan(&record, &limits(1 << 20));
    assert_eq!(roomy.actions, [Action::Keep, Action::Absent]);
    let tight = make_plan(&record, &limits(1300));
    assert!(tight.actions[1] != Action::Absent || tight.actions[0] != Action::Rebuild, "{tight:?}");
}

/// The schedule obeys its own rules whatever the step: it fetches only what has left, in time for
/// the need, and a plan never exceeds a budget that offloading everything would keep.
#[test]
fn random_plans_keep_the_rules() {
    for seed in 0..300 {
        let mut random = fastrand::Rng::with_seed(seed);
        let n = random.usize(2..60);
        let record = random_step(&mut random, n);
        let low = limits(0);
        let all_out = simulate(&record, &vec![Action::Offload; n], &low).1.peak_bytes;
        let budget = random.u64(all_out..=record.keep_all_peak_bytes().max(all_out));
        let plan = make_plan(&record, &limits(budget));
        assert!(plan.predicted.peak_bytes <= budget, "seed {seed}: {:?} over {budget}", plan.predicted);
        assert_eq!(simulate(&record, &plan.actions, &limits(budget)).1, plan.predicted, "seed {seed}");
        let released: Vec<_> = plan.schedule.releases.iter().map(|&(_, unit)| unit).collect();
        for &(at, unit) in &plan.schedule.fetches {
            assert!(released.contains(&unit), "seed {seed}: {unit} is fetched and has not left");
            assert!(Some(at) <= record.units[unit].needed_at, "seed {seed}: {unit} is fetched too late");
        }
    }
}

/// Every choice of actions for a small step against the plan.
#[test]
fn plans_come_close_to_brute_force() {
    let (mut worst, mut total, mut cases) = (1.0f64, 0.0, 0);
    for seed in 0..120 {
        let mut random = fastrand::Rng::with_seed(seed);
        let record = random_step(&mut random, 5);
        let all_out = simulate(&record, &[Action::Offload; 5], &limits(0)).1.peak_bytes;
        let budget = random.u64(all_out..record.keep_all_peak_bytes().max(all_out + 1));
        let best = brute_force(&record, &limits(budget));
        let plan = make_plan(&record, &limits(budget));
        let ratio = plan.predicted.step_us / best;
        worst = worst.max(ratio);
        total += ratio;
        cases += 1;
    }
    println!("plan over brute force: mean {:.4}, worst {worst:.4}", total / f64::from(cases));
    assert!(total / f64::from(cases) < 1.03, "mean {}", total / f64::from(cases));
    assert!(worst < 1.4, "worst {worst}");
}

fn brute_force(record: &StepRecord, limits: &Limits) -> f64 {
    const CHOICES: [Action; 4] = [Action::Keep, Action::Offload, Action::Rebuild, Action::Compress];
    let n = record.units.len();
    let mut best = f64::INFINITY;
    for code in 0..4usize.pow(n as u32) {
        let actions: Vec<_> = (0..n).map(|unit| CHOICES[code / 4usize.pow(unit as u32) % 4]).collect();
        let possible = |(unit, action): (&Unit, &Action)| match action {
            Action::Rebuild => unit.recipe.is_some(),
            Action::Compress => unit.coded.is_some(),
            _ => true,
        };
        if record.units.iter().zip(&actions).all(possible) {
            let (_, predicted) = simulate(record, &actions, limits);
            if predicted.peak_bytes <= limits.budget_bytes {
                best = best.min(predicted.step_us);
            }
        }
    }
    best
}

/// What the physics allows at half the memory; a plan that loses much of it is a worse planner. The step alone is
/// what one H200 took for it.
#[test]
fn half_the_memory_of_llama_blocks() {
    let link = Link { offload_gbps: 55.0, onboard_gbps: 55.0 };
    let speeds = Speeds { matmul_flops: 737e12, memory_bytes: 4.8e12 };
    for (hidden, layers, step_us, most) in
        [(2048, 16, 242.6e3, 1.09), (4096, 8, 359.1e3, 1.05), (8192, 4, 600.3e3, 1.02)]
    {
        let inner = hidden * 43 / 16;
        let shape = Shape { layers, hidden, inner, kv: hidden, batch: 4, sequence: 4096, ..Shape::default() };
        let record = shape.step(&speeds, 0);
        let budget_bytes = record.unit_bytes() / 2;
        let limits = Limits { budget_bytes, lookahead_bytes: 0, slack_bytes: 0, host_bytes: u64::MAX, link };
        let plan = make_plan(&record, &limits);
        let alone_us = record.events.last().map_or(0.0, |event| event.time_us);
        println!(
            "h={hidden} {:.4}x of {alone_us:.0}: {:?}",
            plan.predicted.step_us / alone_us,
            plan.predicted
        );
        assert!((alone_us / step_us - 1.0).abs() < 0.06, "{alone_us} against {step_us}");
        assert!(plan.predicted.peak_bytes <= budget_bytes);
        assert!(plan.predicted.step_us <= alone_us * most);
    }
}

/// A step of eight Llama blocks of h = 4096 over 16,384 tokens on an H200.
fn blocks_h4096() -> StepRecord {
    let shape = Shape {
        layers: 8,
        hidden: 4096,
        inner: 11_008,
        kv: 4096,
        batch: 4,
        sequence: 4096,
        ..Shape::default()
    };
    shape.step(&Speeds { matmul_flops: 737e12, memory_bytes: 4.8e12 }, 0)
}

/// A tenth of the memory: elementwise results cannot be rebuilt, as there is no room for their inputs at once, but
/// products of a layer's input can. Taking recipes in one order for all gives 1.72 here.
#[test]
fn what_is_rebuilt_depends_on_the_room_for_its_inputs() {
    let mut record = blocks_h4096();
    record.units.iter_mut().for_each(|unit| unit.coded = None);
    let budget_bytes = (record.unit_bytes() as f64 * 0.098) as u64;
    let link = Link { offload_gbps: 53.5, onboard_gbps: 53.5 };
    let plan = make_plan(
        &record,
        &Limits { budget_bytes, lookahead_bytes: 0, slack_bytes: 0, host_bytes: u64::MAX, link },
    );
    let ratio = plan.predicted.step_us / record.events.last().map_or(1.0, |event| event.time_us);
    println!("a tenth of the memory, h = 4096: {ratio:.4} {:?}", plan.predicted);
    assert!(plan.predicted.peak_bytes <= budget_bytes, "{:?}", plan.predicted);
    assert!(ratio < 1.3, "{ratio} {:?}", plan.predicted);
}

/// Where the host has less room than the link has time, more is rebuilt.
#[test]
fn what_leaves_fits_the_host() {
    let mut record = blocks_h4096();
    let link = Link { offload_gbps: 53.5, onboard_gbps: 53.5 };
    let plan = |record: &StepRecord, host_bytes| {
        let budget_bytes = record.unit_bytes() / 4;
        let plan =
            make_plan(record, &Limits { budget_bytes, lookahead_bytes: 0, slack_bytes: 0, host_bytes, link });
        assert!(plan.predicted.peak_bytes <= budget_bytes, "{:?}", plan.predicted);
        plan.predicted
    };
    for is_coded in [true, false] {
        let free = plan(&record, u64::MAX);
        let tight = plan(&record, free.host_bytes * 2 / 3);
        println!("coded {is_coded}: {free:?}, two thirds of the host {tight:?}");
        assert!(tight.host_bytes <= free.host_bytes * 2 / 3, "{tight:?}");
        assert!(tight.rebuilt_bytes > free.rebuilt_bytes && tight.step_us >= free.step_us, "{tight:?}");
        if !is_coded {
            assert_eq!(tight.host_bytes, tight.offloaded_bytes);
        }
        record.units.iter_mut().for_each(|unit| unit.coded = None);
    }
}

/// A quarter of the memory over half the link: the codec is chosen, and is worth it.
#[test]
fn the_codec_is_taken_where_the_link_binds() {
    let speeds = Speeds { matmul_flops: 737e12, memory_bytes: 4.8e12 };
    let shape = |hidden, layers| Shape {
        layers,
        hidden,
        inner: hidden * 43 / 16,
        kv: hidden,
        batch: 4,
        sequence: 4096,
        ..Shape::default()
    };
    let step = |hidden, layers, gbps: f64, share: f64, with_codec: bool| {
        let mut record = shape(hidden, layers).step(&speeds, 0);
        if !with_codec {
            record.units.iter_mut().for_each(|unit| unit.coded = None);
        }
        let budget_bytes = (record.unit_bytes() as f64 * share) as u64;
        let link = Link { offload_gbps: gbps, onboard_gbps: gbps };
        let plan = make_plan(
            &record,
            &Limits { budget_bytes, lookahead_bytes: 0, slack_bytes: 0, host_bytes: u64::MAX, link },
        );
        assert!(plan.predicted.peak_bytes <= budget_bytes, "{:?}", plan.predicted);
        (plan.predicted.step_us / record.events.last().map_or(1.0, |event| event.time_us), plan.predicted)
    };
    for (hidden, layers, gbps, share) in [
        (2048, 16, 55.0, 0.5),
        (4096, 8, 55.0, 0.5),
        (4096, 8, 55.0, 0.2),
        (8192, 4, 55.0, 0.5),
        (8192, 12, 55.0, 0.25),
        (8192, 4, 55.0, 0.19),
        (8192, 12, 27.0, 0.25),
    ] {
        let (without, with) =
            (step(hidden, layers, gbps, share, false), step(hidden, layers, gbps, share, true));
        println!(
            "h={hidden} {layers} layers, {share} of it, {gbps} GB/s: {:.4} without the codec, {:.4} with {:?}",
            without.0, with.0, with.1
        );
        assert!(with.0 <= without.0 + 1e-9, "{with:?} {without:?}");
    }
    let (without, with) = (step(8192, 12, 27.0, 0.25, false), step(8192, 12, 27.0, 0.25, true));
    assert!(with.1.compressed_bytes > 0 && with.0 < without.0 * 0.99, "{with:?} {without:?}");
}

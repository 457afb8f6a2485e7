//! Simulations end, lose nobody, and come out the same each time; Djinn's rules keep what they promise.

use overspill_djinn::simulate::{Arrival, Kind, RULES, Recipe, Setup, Turn, fingerprint, simulate};

fn setup(slabs: usize, host_gb: f64, disk_gb: f64) -> Setup {
    Setup {
        about: String::new(),
        token_bytes: 1_000_000,
        slab_tokens: 1000,
        slabs,
        seats: 4,
        host_gb,
        disk_gb,
        out_gbps: 50.0,
        in_gbps: 50.0,
        write_gbps: 2.0,
        read_gbps: 3.0,
        prefill_ms: 100.0,
        step_ms: 10.0,
        step_more_ms: 0.5,
        deadline_ms: 500.0,
    }
}

fn recipe(seed: u64) -> Recipe {
    let kind = |name: &str, wait_median_ms, share| Kind {
        name: name.into(),
        share,
        turns: 5.0,
        prompt_tokens: 200.0,
        tool_tokens: 40.0,
        new_tokens: 20.0,
        wait_median_ms,
        wait_sigma: 0.5,
    };
    Recipe {
        about: String::new(),
        seed,
        sessions: 300,
        sessions_per_s: 3.0,
        limit_tokens: 1000,
        told_share: 0.8,
        told_sigma: 0.3,
        kinds: vec![kind("short", 300.0, 0.6), kind("long", 8000.0, 0.4)],
        xxh3: None,
    }
}

fn rule(name: &str) -> &'static overspill_djinn::simulate::Rule {
    RULES.iter().find(|rule| rule.name == name).expect("a rule")
}

#[test]
fn nobody_is_lost_under_any_rule_and_every_run_is_the_same() {
    for seed in 0..4 {
        let trace = recipe(seed).draw();
        let tokens: u64 = trace.iter().flat_map(|arrival| &arrival.turns).map(|turn| turn.new_tokens).sum();
        // With room, with host memory that runs out, and with neither host memory nor slabs.
        for setup in [setup(12, 60.0, 500.0), setup(8, 6.0, 500.0), setup(2, 5.0, 100.0)] {
            for rule in &RULES {
                let mut first = simulate(&setup, &trace, rule, 1.0).expect("no refusal");
                let second = simulate(&setup, &trace, rule, 1.0).expect("no refusal");
                let what = format!("seed {seed}, {}, {} slabs", rule.name, setup.slabs);
                assert_eq!((first.lost_sessions, first.tokens), (0, tokens), "{what}");
                assert_eq!(first.first_us, second.first_us, "{what}");
                assert_eq!(first.end_us, second.end_us, "{what}");
                assert!(rule.may_discard || first.rebuilt_tokens == 0, "{what}");
                assert!(
                    first.first_ms(0.0) >= setup.step_ms - setup.step_more_ms,
                    "{what}: faster than a step"
                );
            }
        }
    }
}

/// One that says when it is needed is there when it is: it left for others meanwhile.
#[test]
fn who_says_when_it_is_needed_is_back_before_it_is_due() {
    let turn = |wait_us, eta_us| Turn { prompt_tokens: 500, new_tokens: 1, wait_us, eta_us };
    let mut trace =
        vec![Arrival { at_us: 0, turns: vec![turn(10_000_000, Some(10_000_000)), turn(0, None)] }];
    for n in 0..8 {
        trace.push(Arrival { at_us: 1_000_000 * (n + 1), turns: vec![turn(100_000, None), turn(0, None)] });
    }
    let outcome = simulate(&setup(1, 60.0, 0.0), &trace, rule("djinn"), 1.0).expect("no refusal");
    assert_eq!(outcome.turns_on_device, 9, "all second turns: eight soon after their first, one foreseen");
    let outcome = simulate(&setup(1, 60.0, 0.0), &trace, rule("lru"), 1.0).expect("no refusal");
    assert_eq!(outcome.turns_on_device, 8);
}

/// A session that does not come back while others are always ready on the device.
#[test]
fn hot_sessions_do_not_starve_a_cold_one() {
    let hot = Turn { prompt_tokens: 1, new_tokens: 2, wait_us: 1, eta_us: Some(1) };
    let cold = |wait_us| Turn { prompt_tokens: 100, new_tokens: 1, wait_us, eta_us: None };
    let mut trace = vec![Arrival { at_us: 0, turns: vec![cold(3_000_000), cold(0)] }];
    for n in 0..6 {
        trace.push(Arrival { at_us: 1_000_000 + n, turns: vec![hot.clone(); 300] });
    }
    let mut outcome = simulate(&setup(4, 60.0, 0.0), &trace, rule("djinn"), 1.0).expect("no refusal");
    // Patience, and one turn of each that is before it.
    assert!(outcome.first_ms(1.0) < 500.0 + 7.0 * 40.0, "{} ms", outcome.first_ms(1.0));
}

#[test]
fn the_generator_draws_what_it_drew() {
    assert_eq!(fingerprint(&recipe(1).draw()), fingerprint(&recipe(1).draw()));
    assert_ne!(fingerprint(&recipe(1).draw()), fingerprint(&recipe(2).draw()));
}

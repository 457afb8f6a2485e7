//! Arithmetic, schedules and verdicts, without a model.

use serde_json::{Value, json};

use super::*;
use crate::bench::judge::judge;

const N50: &str = include_str!("../../../../bench/sessions/n50_13b.yaml");

fn config(changes: &[(&str, &str)]) -> Config {
    let text = changes.iter().fold(N50.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "{from}");
        text.replace(from, to)
    });
    Config::parse(&text).expect("a sound experiment")
}

#[test]
fn fifty_sessions_of_a_13b_shape_are_a_hundred_and_ten_gigabytes() {
    let plan = plan(&config(&[])).expect("oversubscribed");
    assert_eq!(plan.token_bytes, 819_200);
    assert_eq!(plan.session_bytes, 1_677_721_600);
    assert_eq!(plan.weight_bytes, 26_031_728_640);
    assert_eq!(plan.demand_bytes, 26_031_728_640 + 50 * 1_677_721_600);
    assert!(plan.arena_bytes + plan.weight_bytes + plan.workspace_bytes <= plan.cap_bytes);
    // The stated tokens a turn are more than arithmetic asks for.
    assert!(plan.expected.tokens_that_hide < 64.0);
}

#[test]
fn what_fits_is_no_oversubscription() {
    let fits = config(&[("cap_gb: 80", "cap_gb: 110")]);
    assert!(matches!(plan(&fits), Err(Failure::Misuse(what)) if what.contains("no oversubscription")));
    let tight = config(&[("cap_gb: 80", "cap_gb: 30")]);
    assert!(matches!(plan(&tight), Err(Failure::Misuse(what)) if what.contains("decode together")));
}

#[test]
fn nonsense_is_refused() {
    for (from, to) in [
        ("sessions: 50", "sessions: 0"),
        ("rows: 13", "rows: 13\nnew: 1"),
        ("cap_gb: 80", "cap_gb: .nan"),
        ("layer: 20", "layer: 40"),
        ("dtype: float16", "dtype: int4"),
        ("heads: 40", "heads: 39"),
    ] {
        assert!(matches!(Config::parse(&N50.replacen(from, to, 1)), Err(Failure::Misuse(_))), "{to}");
    }
}

/// Nobody decodes who is not on the device, and the device is never fuller than it is.
fn check_residency(plan: &Plan) {
    let mut resident = BTreeSet::new();
    let mut restores = 0;
    for turn in &plan.turns {
        for id in &turn.leave {
            assert!(resident.remove(id), "{id} leaves twice");
        }
        restores += turn.prefetch.len() as u64;
        resident.extend(turn.prefetch.iter().copied());
        for id in &turn.rows {
            restores += u64::from(resident.insert(*id) && !turn.start.contains(id));
        }
        assert!(resident.len() as u64 <= plan.slabs);
    }
    assert_eq!(restores, plan.expected.restores);
}

#[test]
fn a_ring_gives_every_session_all_its_tokens_and_swaps_ahead() {
    let plan = plan(&config(&[])).expect("oversubscribed");
    check_residency(&plan);
    for id in 0..50 {
        let last = plan.turns.iter().rev().find(|turn| turn.rows.contains(&id)).expect("has turns");
        assert_eq!(last.to[0], 128);
    }
    // From the first ring's end on, each turn finds its rows on the device.
    for pair in plan.turns.windows(2).filter(|pair| pair[1].start.is_empty()) {
        let there: BTreeSet<_> = pair[0].prefetch.iter().chain(&pair[0].rows).collect();
        let late = pair[1].rows.iter().filter(|id| !there.contains(id)).count();
        assert!(late <= 2 * 13, "{late}");
    }
}

#[test]
fn breaks_cut_turns_where_they_stop() {
    let three = "breaks: [{layer: 10, step: 1}, {layer: 20, step: 9}, {layer: 30, step: 9}]";
    let plan = plan(&config(&[("breaks: [{layer: 20, step: 1}]", three)])).expect("oversubscribed");
    let of_first: Vec<u32> =
        plan.turns.iter().filter(|turn| turn.rows.contains(&0)).map(|turn| turn.to[0]).collect();
    assert_eq!(of_first, [2, 10, 10, 73, 128]);
    check_residency(&plan);
}

#[test]
fn agents_come_wait_and_end() {
    for seed in 0..20 {
        let agents = format!("breaks: []\nseed: {seed}\nagents: {{arrival_steps: 20, tool_steps: 300}}");
        let plan = plan(&config(&[("breaks: [{layer: 20, step: 1}]", &agents), ("rows: 13", "rows: 8")]))
            .expect("oversubscribed");
        check_residency(&plan);
        let started: usize = plan.turns.iter().map(|turn| turn.start.len()).sum();
        assert_eq!(started, 50, "seed {seed}");
        for id in 0..50u32 {
            let most = plan
                .turns
                .iter()
                .filter_map(|turn| turn.rows.iter().position(|&row| row == id).map(|at| turn.to[at]));
            assert_eq!(most.max(), Some(128), "seed {seed}");
        }
    }
}

/// Parts as a sound run leaves them.
fn parts(plan: &Plan) -> (Value, Value) {
    let ids: Vec<u32> = plan.turns.iter().flat_map(|turn| turn.start.clone()).collect();
    let tokens: Value =
        ids.iter().map(|id| (id.to_string(), json!(vec![7; 128]))).collect::<serde_json::Map<_, _>>().into();
    let logits: Value =
        ids.iter().map(|id| (id.to_string(), json!("bits"))).collect::<serde_json::Map<_, _>>().into();
    let swaps = json!([{"id": 1, "cause": "restore", "bytes": 1_677_721_600u64, "copy_us": 30_500.0}]);
    let pool = json!({
        "tokens": tokens, "logits": logits, "swaps": swaps, "lost": [], "timeline": [[0.0, 79_000_000_000u64]],
        "timeline_source": "NVML", "turn_tokens": 100, "turn_s": 1.0, "link": {"in_gbps": 55.4},
    });
    let oracle = json!({"tokens": tokens, "logits": logits, "turn_tokens": 100, "turn_s": 0.95});
    (pool, oracle)
}

type Flaw = fn(&mut Value, &mut Value);

#[test]
fn a_sound_run_passes_and_each_flaw_fails() {
    let plan = plan(&config(&[])).expect("oversubscribed");
    let (pool, oracle) = parts(&plan);
    let sound = judge(&plan, &pool, &oracle);
    assert!(sound.passed, "{:?}", sound.checks);
    assert!((sound.figures["turn_throughput_vs_oracle"].as_f64().expect("both ran") - 0.95).abs() < 1e-9);
    let flaws: [(&str, Flaw); 8] = [
        ("sessions were swapped", |pool, _| pool["swaps"] = json!([])),
        ("no session was lost", |pool, oracle| {
            pool["tokens"]["3"] = json!([7]);
            oracle["tokens"]["3"] = json!([7]);
        }),
        ("no session was lost", |pool, _| pool["tokens"]["3"] = Value::Null),
        ("tokens and logits are those of no swap", |pool, _| pool["tokens"]["3"][5] = json!(8)),
        ("tokens and logits are those of no swap", |pool, _| pool["logits"]["3"] = json!("other")),
        ("tokens and logits are those of no swap", |_, oracle| *oracle = Value::Null),
        ("the timeline stays under the cap", |pool, _| pool["timeline"] = json!([[0.0, 80_000_000_001u64]])),
        ("the timeline stays under the cap", |pool, _| pool["timeline"] = json!([])),
    ];
    for (name, flaw) in flaws {
        let (mut pool, mut oracle) = (pool.clone(), oracle.clone());
        flaw(&mut pool, &mut oracle);
        let verdict = judge(&plan, &pool, &oracle);
        let failed: Vec<_> =
            verdict.checks.iter().filter(|check| !check.passed).map(|check| check.name).collect();
        assert!(failed.contains(&name), "{name}: {failed:?}");
        assert!(!verdict.passed);
    }
}

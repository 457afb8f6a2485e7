//! The verdict: what an experiment has to show, and the figures that follow from its parts.
//!
//! Made of the parts' files alone. A file that is missing or says less than it should fails its check: nothing is
//! taken for granted.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::schedule::Plan;
use crate::table;

/// One thing that had to be so.
#[derive(Debug, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub passed: bool,
    pub detail: String,
}

/// All checks and the figures.
#[derive(Debug, Serialize)]
pub struct Verdict {
    pub passed: bool,
    pub checks: Vec<Check>,
    pub figures: Map<String, Value>,
}

/// Judges the run under the cap (`pool`) against the run without swaps (`oracle`).
pub fn judge(plan: &Plan, pool: &Value, oracle: &Value) -> Verdict {
    let checks = vec![swapped(pool), lost(plan, pool), tokens(pool, oracle), under_cap(plan, pool)];
    Verdict { passed: checks.iter().all(|check| check.passed), checks, figures: figures(plan, pool, oracle) }
}

fn swaps<'a>(pool: &'a Value, cause: &'a str) -> impl Iterator<Item = &'a Value> {
    let all = pool["swaps"].as_array().map(Vec::as_slice).unwrap_or_default();
    all.iter().filter(move |swap| swap["cause"] == cause && swap["bytes"].as_u64().unwrap_or(0) > 0)
}

fn swapped(pool: &Value) -> Check {
    let (count, bytes) = swaps(pool, "restore")
        .fold((0, 0), |(count, bytes), swap| (count + 1, bytes + swap["bytes"].as_u64().unwrap_or(0)));
    let detail = format!("{count} sessions came back, {:.3} GB", bytes as f64 / 1e9);
    Check { name: "sessions were swapped", passed: count > 0, detail }
}

/// Ids of all sessions that the schedule starts, as the parts write them.
fn sessions(plan: &Plan) -> Vec<String> {
    plan.turns.iter().flat_map(|turn| &turn.start).map(u32::to_string).collect()
}

/// Tokens that the schedule gives a session in the end.
fn owed(plan: &Plan, id: &str) -> u64 {
    let of_turn = |turn: &super::schedule::Turn| {
        turn.rows
            .iter()
            .zip(&turn.to)
            .filter(|(row, _)| row.to_string() == id)
            .map(|(_, &to)| u64::from(to))
            .max()
    };
    plan.turns.iter().filter_map(of_turn).max().unwrap_or(0)
}

fn lost(plan: &Plan, pool: &Value) -> Check {
    let lacks = |id: &&String| {
        pool["tokens"][id.as_str()].as_array().map_or(0, Vec::len) as u64 != owed(plan, id.as_str())
    };
    let ids = sessions(plan);
    let missing: Vec<&str> = ids.iter().filter(lacks).map(String::as_str).collect();
    let why =
        pool["lost"].as_array().and_then(|lost| lost.first()).map_or(String::new(), |one| format!("; {one}"));
    let detail = format!("{} of {} without all their tokens{why}", missing.len(), ids.len());
    Check { name: "no session was lost", passed: missing.is_empty(), detail }
}

fn tokens(pool: &Value, oracle: &Value) -> Check {
    let name = "tokens and logits are those of no swap";
    let Some(expected) = oracle["tokens"].as_object().filter(|all| !all.is_empty()) else {
        return Check { name, passed: false, detail: "there is no oracle to compare with".to_owned() };
    };
    let differ = |what: &str| {
        expected
            .keys()
            .filter(|id| {
                let (found, wanted) = (&pool[what][id.as_str()], &oracle[what][id.as_str()]);
                wanted.is_null() || found != wanted
            })
            .count()
    };
    let (tokens, logits) = (differ("tokens"), differ("logits"));
    let detail = format!(
        "{} sessions compared; tokens of {tokens} and last logits of {logits} differ",
        expected.len()
    );
    Check { name, passed: tokens + logits == 0, detail }
}

fn samples(part: &Value) -> Vec<(f64, u64)> {
    let all = part["timeline"].as_array().map(Vec::as_slice).unwrap_or_default();
    all.iter().filter_map(|sample| Some((sample[0].as_f64()?, sample[1].as_u64()?))).collect()
}

fn under_cap(plan: &Plan, pool: &Value) -> Check {
    let name = "the timeline stays under the cap";
    let samples = samples(pool);
    let Some(most) = samples.iter().map(|(_, bytes)| *bytes).max() else {
        return Check { name, passed: false, detail: "there is no timeline".to_owned() };
    };
    let source = pool["timeline_source"].as_str().unwrap_or("?");
    let detail = format!(
        "{source}: at most {:.3} GB of {:.3}, {} samples",
        most as f64 / 1e9,
        plan.limit_bytes as f64 / 1e9,
        samples.len()
    );
    Check { name, passed: most <= plan.limit_bytes, detail }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn figures(plan: &Plan, pool: &Value, oracle: &Value) -> Map<String, Value> {
    let rate = |part: &Value, what: &str| {
        Some(
            part[format!("{what}_tokens")].as_f64()?
                / part[format!("{what}_s")].as_f64().filter(|s| *s > 0.0)?,
        )
    };
    // The same work in both: times, not rates, since a paused step's token is counted where it ends.
    let ratio = |what: &str| {
        let seconds = format!("{what}_s");
        Some(oracle[&seconds].as_f64()? / pool[&seconds].as_f64().filter(|s| *s > 0.0)?)
    };
    let most = samples(pool).iter().map(|(_, bytes)| *bytes).max();
    let restores: Vec<(f64, f64)> = swaps(pool, "restore")
        .filter_map(|swap| Some((swap["bytes"].as_f64()?, swap["copy_us"].as_f64().filter(|us| *us > 0.0)?)))
        .collect();
    let gbps = median(restores.iter().map(|(bytes, us)| bytes / us / 1e3).collect());
    let ids = sessions(plan);
    let lost = ids
        .iter()
        .filter(|id| pool["tokens"][id.as_str()].as_array().map_or(0, Vec::len) as u64 != owed(plan, id));
    let moved = |cause| swaps(pool, cause).filter_map(|swap| swap["bytes"].as_u64()).sum::<u64>();
    let pairs = [
        ("demand_bytes", json!(plan.demand_bytes)),
        ("cap_bytes", json!(plan.cap_bytes)),
        ("most_bytes", json!(most)),
        ("over_cap_bytes", json!(most.map(|most| most.saturating_sub(plan.limit_bytes)))),
        ("lost_sessions", json!(lost.count())),
        ("restores", json!(restores.len())),
        ("restored_bytes", json!(moved("restore"))),
        ("written_through_bytes", json!(moved("write-through"))),
        ("evicted_bytes", json!(moved("evict"))),
        ("spilled_bytes", json!(moved("spill"))),
        ("unspilled_bytes", json!(moved("unspill"))),
        ("restore_ms", json!(median(restores.iter().map(|(_, us)| us / 1e3).collect()))),
        ("restore_gbps", json!(gbps)),
        ("link_in_gbps", pool["link"]["in_gbps"].clone()),
        ("restore_share_of_link", json!(gbps.zip(pool["link"]["in_gbps"].as_f64()).map(|(a, b)| a / b))),
        ("turn_tokens_per_s", json!(rate(pool, "turn"))),
        ("oracle_turn_tokens_per_s", json!(rate(oracle, "turn"))),
        ("turn_throughput_vs_oracle", json!(ratio("turn"))),
        ("all_tokens_per_s", json!(rate(pool, "all"))),
        ("all_throughput_vs_oracle", json!(ratio("all"))),
    ];
    pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// The verdict, for people.
pub fn to_text(verdict: &Verdict, baselines: &Value) -> String {
    let mut rows: Vec<Vec<String>> = Vec::new();
    for (name, value) in verdict.figures.iter().filter(|(_, value)| !value.is_null()) {
        let shown = match value.as_f64() {
            Some(bytes) if name.ends_with("_bytes") => format!("{:.3} GB", bytes / 1e9),
            Some(number) if value.is_f64() => format!("{number:.3}"),
            _ => value.to_string(),
        };
        rows.push(vec![name.replace('_', " "), shown]);
    }
    for row in baselines["rows"].as_array().map(Vec::as_slice).unwrap_or_default() {
        let text = |what: &str| row[what].as_str().unwrap_or("-").to_owned();
        let number = row["value"].as_f64().map_or("-".to_owned(), |value| format!("{value:.4}"));
        rows.push(vec![format!("{}: {}", text("way"), text("what")), format!("{number} {}", text("unit"))]);
    }
    let mut text = table::columns(&rows);
    for check in &verdict.checks {
        let mark = if check.passed { "ok    " } else { "FAILED" };
        text.push_str(&format!("\n{mark}  {}: {}", check.name, check.detail));
    }
    text.push_str(if verdict.passed { "\nverdict: passed" } else { "\nverdict: FAILED" });
    text
}

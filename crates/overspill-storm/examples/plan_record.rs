#![forbid(unsafe_code)]
//! Plans a recorded step from a file, `plan_record FILE BUDGET_BYTES [LINK_GBPS]`, and says what it should
//! cost and how long planning took, as JSON. FILE holds what `Planner.record_json()` of the extension gave.

use std::{process::ExitCode, time::Instant};

use overspill_storm::{Limits, Link, StepRecord, make_plan};

fn main() -> ExitCode {
    match run() {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("plan_record: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<String, String> {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let [path, budget, rest @ ..] = args.as_slice() else {
        return Err("usage: plan_record FILE BUDGET_BYTES [LINK_GBPS]".to_owned());
    };
    let text = std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
    let record: StepRecord = serde_json::from_str(&text).map_err(|error| format!("{path}: {error}"))?;
    let budget_bytes = budget.parse().map_err(|error| format!("{budget}: {error}"))?;
    let gbps =
        rest.first().map_or(Ok(55.0), |text| text.parse()).map_err(|error| format!("link: {error}"))?;
    let link = Link { offload_gbps: gbps, onboard_gbps: gbps };
    let limits = Limits { budget_bytes, lookahead_bytes: 0, slack_bytes: 0, link };
    let begin = Instant::now();
    let plan = make_plan(&record, &limits);
    let plan_ms = begin.elapsed().as_secs_f64() * 1e3;
    let alone_us = record.events.last().map_or(0.0, |event| event.time_us);
    let report = serde_json::json!({
        "units": record.units.len(),
        "plan_ms": plan_ms,
        "alone_us": alone_us,
        "predicted": plan.predicted,
    });
    Ok(report.to_string())
}

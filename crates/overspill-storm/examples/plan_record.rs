#![forbid(unsafe_code)]
//! Plans a step, `plan_record STEP BUDGET_BYTES [LINK_GBPS]`, and says what it should cost and how long
//! planning took, as JSON. STEP is a file with what `Planner.record_json()` of the extension gave, or a number:
//! that many layers of the 8B shape.

use std::{process::ExitCode, time::Instant};

use overspill_storm::{Limits, Link, Shape, Speeds, StepRecord, make_plan};

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
        return Err("usage: plan_record STEP BUDGET_BYTES [LINK_GBPS]".to_owned());
    };
    let record = match path.parse() {
        Ok(layers) => by_arithmetic(layers),
        Err(_) => from_file(path)?,
    };
    let budget_bytes = budget.parse().map_err(|error| format!("{budget}: {error}"))?;
    let gbps =
        rest.first().map_or(Ok(55.0), |text| text.parse()).map_err(|error| format!("link: {error}"))?;
    let link = Link { offload_gbps: gbps, onboard_gbps: gbps };
    let limits = Limits { budget_bytes, lookahead_bytes: 0, slack_bytes: 0, host_bytes: u64::MAX, link };
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

fn from_file(path: &str) -> Result<StepRecord, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
    serde_json::from_str(&text).map_err(|error| format!("{path}: {error}"))
}

fn by_arithmetic(layers: u64) -> StepRecord {
    let (hidden, inner, kv) = (4096, 14_336, 1024);
    let shape = Shape { layers, hidden, inner, kv, batch: 4, sequence: 4096, ..Shape::default() };
    shape.step(&Speeds { matmul_flops: 737e12, memory_bytes: 4.8e12 }, 0)
}

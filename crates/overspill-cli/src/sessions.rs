//! `overspill sessions`: Djinn's scheduler on a machine that is described, against other rules.

use std::path::{Path, PathBuf};

use overspill_djinn::simulate::{
    Arrival, Limits, Outcome, RULES, Recipe, Rule, Setup, capacity, fingerprint, simulate,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::{Failure, table};

/// The machine that is described if no other one is.
const H200: &str = include_str!("../machines/h200_llama13b.json");

/// A year, and more tokens than a session of any machine has.
const LIMITS: Limits = Limits { us: 31_536_000_000_000, tokens: 1 << 32 };

/// Sessions without a model: the scheduler alone.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Simulate(Simulate),
    Trace(Trace),
}

/// Runs a trace of sessions under Djinn's scheduler and under other rules, in simulated time on recorded costs.
///
/// Nothing is moved and no GPU is needed. `clairvoyant` is Djinn's scheduler told every wait truly; `djinn-discard`
/// may also throw sessions away and compute them again, which gives other bits. A turn is in time if its first new
/// token comes within the machine's deadline after its session was ready.
///
/// Examples:
///   overspill sessions simulate bench/traces/agents.json
///   overspill sessions simulate bench/traces/agents.json --policy djinn,lru --speed 1.5
///   overspill sessions simulate bench/traces/coding.json --capacity --json
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
struct Simulate {
    /// The trace: a recipe that it is drawn from, or what `overspill sessions trace` prints.
    trace: PathBuf,
    /// Rules: djinn, djinn-discard, lru, fifo, always-swap, never-swap, recompute, clairvoyant. Default: all.
    #[arg(long, value_delimiter = ',')]
    policy: Vec<String>,
    /// The machine; default: one H200 under a cap of 80 GB, Llama-2-13B shape.
    #[arg(long)]
    machine: Option<PathBuf>,
    /// Arrivals come this many times as fast as they are written down.
    #[arg(long, default_value_t = 1.0)]
    speed: f64,
    /// Also find how fast arrivals may come with 99 of 100 turns in time.
    #[arg(long)]
    capacity: bool,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// Draws a recipe and prints every session of it: when it arrives, its turns and its waits.
///
/// Examples:
///   overspill sessions trace bench/traces/agents.json > agents-drawn.json
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
struct Trace {
    /// The recipe.
    recipe: PathBuf,
}

/// What one rule came to.
struct Row {
    rule: &'static Rule,
    outcome: Outcome,
    /// Sessions that may arrive in a second.
    capacity_per_s: Option<f64>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<(), Failure> {
    match &args.what {
        What::Simulate(args) => run_simulate(args),
        What::Trace(args) => {
            let text = read(&args.recipe)?;
            let trace = load(&args.recipe, &text)?;
            table::print_json(&json!({ "sessions": trace }))
        }
    }
}

fn run_simulate(args: &Simulate) -> Result<(), Failure> {
    let trace = load(&args.trace, &read(&args.trace)?)?;
    let setup: Setup = match &args.machine {
        Some(path) => parse(path, &read(path)?)?,
        None => parse(Path::new("the H200"), H200)?,
    };
    setup.check().map_err(Failure::Misuse)?;
    if !(args.speed.is_finite() && args.speed > 0.0) {
        return Err(Failure::Misuse(format!("--speed has to be a positive number, not {}", args.speed)));
    }
    let last_us = trace.last().map_or(0, |arrival| arrival.at_us).max(1);
    let per_s = trace.len() as f64 / (last_us as f64 / 1e6);
    let rows = chosen(&args.policy)?
        .into_iter()
        .map(|rule| {
            let outcome = simulate(&setup, &trace, rule, args.speed).map_err(failed)?;
            let fit = args.capacity.then(|| capacity(&setup, &trace, rule)).transpose().map_err(failed)?;
            Ok(Row { rule, outcome, capacity_per_s: fit.map(|fit| fit * per_s) })
        })
        .collect::<Result<Vec<Row>, Failure>>()?;
    if args.json {
        return table::print_json(&to_json(&setup, &trace, rows));
    }
    table::print(&to_text(&setup, &trace, per_s * args.speed, rows))
}

fn failed(error: overspill_djinn::Error) -> Failure {
    Failure::Failed(error.to_string())
}

fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|error| Failure::Failed(format!("{}: {error}", path.display())))
}

fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, Failure> {
    serde_json::from_str(text).map_err(|error| Failure::Failed(format!("{}: {error}", path.display())))
}

/// The trace of a file: drawn, if it is a recipe.
fn load(path: &Path, text: &str) -> Result<Vec<Arrival>, Failure> {
    let value: Value = parse(path, text)?;
    if let Some(sessions) = value.get("sessions").filter(|sessions| sessions.is_array()) {
        let trace: Vec<Arrival> = parse(path, &sessions.to_string())?;
        let all_fit = trace.iter().all(|arrival| arrival.check(&LIMITS));
        return all_fit.then_some(trace).ok_or_else(|| {
            let limits = format!("{} us and {} tokens a session", LIMITS.us, LIMITS.tokens);
            Failure::Failed(format!("{}: a session is beyond {limits}", path.display()))
        });
    }
    let recipe: Recipe = parse(path, text)?;
    recipe.check().map_err(|what| Failure::Failed(format!("{}: {what}", path.display())))?;
    let trace = recipe.draw();
    let found = fingerprint(&trace);
    match &recipe.xxh3 {
        Some(expected) if *expected != found => Err(Failure::Failed(format!(
            "{}: drew a trace of xxh3 {found}, not {expected}: the generator has changed",
            path.display()
        ))),
        _ => Ok(trace),
    }
}

fn chosen(names: &[String]) -> Result<Vec<&'static Rule>, Failure> {
    if names.is_empty() {
        return Ok(RULES.iter().collect());
    }
    let known = || RULES.map(|rule| rule.name).join(", ");
    let find = |name: &String| {
        let found = RULES.iter().find(|rule| rule.name == name);
        found.ok_or_else(|| Failure::Misuse(format!("no policy is called {name:?}; there are {}", known())))
    };
    names.iter().map(find).collect()
}

fn to_text(setup: &Setup, trace: &[Arrival], per_s: f64, rows: Vec<Row>) -> String {
    let head = ["policy", "tokens/s", "p50 ms", "p99 ms", "late", "on device", "in GB", "out GB", "disk GB"];
    let more = ["rebuilt", "lost", "sessions/s in time", "decision us p99"];
    let mut lines = vec![head.iter().chain(&more).map(|&name| name.to_owned()).collect::<Vec<_>>()];
    let gb = |bytes: u64| format!("{:.0}", bytes as f64 / 1e9);
    for Row { rule, mut outcome, capacity_per_s } in rows {
        let share = |part: u64| format!("{:.2}%", 100.0 * part as f64 / outcome.turns.max(1) as f64);
        let (late, on_device) = (share(outcome.missed(setup.deadline_ms)), share(outcome.turns_on_device));
        lines.push(vec![
            rule.name.to_owned(),
            format!("{:.0}", outcome.tokens_per_s()),
            format!("{:.0}", outcome.first_ms(0.5)),
            format!("{:.0}", outcome.first_ms(0.99)),
            late,
            on_device,
            gb(outcome.in_bytes),
            gb(outcome.out_bytes),
            gb(outcome.written_bytes + outcome.read_bytes),
            outcome.rebuilt_tokens.to_string(),
            outcome.lost_sessions.to_string(),
            capacity_per_s.map_or_else(|| "-".to_owned(), |per_s| format!("{per_s:.3}")),
            format!("{:.2}", outcome.decision_us(0.99)),
        ]);
    }
    let turns: usize = trace.iter().map(|arrival| arrival.turns.len()).sum();
    format!(
        "{} sessions, {turns} turns, {per_s:.3} sessions/s; {} slabs, batches of {}, {} GB of host memory, late after {} ms\n\
         simulated on recorded costs; ms from ready to the first new token\n\n{}",
        trace.len(),
        setup.slabs,
        setup.seats,
        setup.host_gb,
        setup.deadline_ms,
        table::columns(&lines)
    )
}

fn to_json(setup: &Setup, trace: &[Arrival], rows: Vec<Row>) -> Value {
    let policies: Vec<Value> = rows
        .into_iter()
        .map(|Row { rule, mut outcome, capacity_per_s }| {
            json!({
                "policy": rule.name,
                "is_static": rule.is_static,
                "tokens_per_s": outcome.tokens_per_s(),
                "first_ms_p50": outcome.first_ms(0.5),
                "first_ms_p99": outcome.first_ms(0.99),
                "turns": outcome.turns,
                "turns_late": outcome.missed(setup.deadline_ms),
                "turns_on_device": outcome.turns_on_device,
                "restores": outcome.restores,
                "in_bytes": outcome.in_bytes,
                "out_bytes": outcome.out_bytes,
                "written_bytes": outcome.written_bytes,
                "read_bytes": outcome.read_bytes,
                "rebuilt_tokens": outcome.rebuilt_tokens,
                "lost_sessions": outcome.lost_sessions,
                "busy_share": outcome.busy_us as f64 / outcome.end_us.max(1) as f64,
                "sessions_per_s_in_time": capacity_per_s,
                "decisions": outcome.decision_ns.len(),
                "decision_us_p50": outcome.decision_us(0.5),
                "decision_us_p99": outcome.decision_us(0.99),
            })
        })
        .collect();
    json!({ "machine": setup, "sessions": trace.len(), "xxh3": fingerprint(trace), "policies": policies })
}

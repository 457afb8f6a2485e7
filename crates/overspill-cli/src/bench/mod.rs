//! `overspill bench sessions`: an experiment is a file; what comes out is a report that can fail.
//!
//! Here are the file, its arithmetic, the schedule and the verdict. The model's steps are Python's
//! (`python -m overspill.density`), one process a part, each of which leaves one JSON file in the output folder:
//! `pool.json` (under the cap), `oracle.json` (the same schedule with nothing swapped), `baselines.json`. The
//! verdict is made of these files alone, so it can be made again (`--judge`).

mod config;
mod judge;
mod schedule;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};

use crate::{Failure, table};
use config::Config;

/// Experiments that run a model: what was demanded, what moved, and whether all came back the same.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Sessions(Sessions),
}

/// More sessions than the device holds: runs an experiment file, writes report.json and report.svg, gives a verdict.
///
/// The verdict fails when nothing was swapped, when tokens differ from those of a run without swaps, when a session
/// is lost, and when the memory that the driver shows crosses the cap. An experiment whose sessions would fit under
/// its cap is refused.
///
/// Examples:
///   overspill bench sessions bench/sessions/cpu_small.yaml
///   overspill bench sessions bench/sessions/n50_13b.yaml --plan
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
struct Sessions {
    /// The experiment.
    config: PathBuf,
    /// Folder for the parts and the report.
    #[arg(long, default_value = "target/sessions")]
    out: PathBuf,
    /// Only the arithmetic: what is demanded, what fits, how long swaps and steps should take.
    #[arg(long)]
    plan: bool,
    /// Only the verdict, of the parts that lie in the folder.
    #[arg(long)]
    judge: bool,
    /// Parts to run: pool, oracle, baselines, plot.
    #[arg(long, value_delimiter = ',')]
    parts: Vec<String>,
}

/// Parts that there are, in the order in which they run.
const PARTS: [&str; 3] = ["pool", "oracle", "baselines"];
/// What is drawn of them.
const PLOT: &str = "plot";

/// Runs the command.
pub fn run(args: &Args) -> Result<(), Failure> {
    let What::Sessions(args) = &args.what;
    let config = Config::read(&args.config)?;
    let plan = schedule::plan(&config)?;
    table::print(&plan.to_text(&config))?;
    if args.plan {
        return Ok(());
    }
    fs::create_dir_all(&args.out).map_err(|error| failed(&args.out, &error))?;
    let experiment = args.out.join("experiment.json");
    write(&experiment, &json!({"config": config, "plan": plan}))?;
    if !args.judge {
        for part in parts(args, &config)? {
            run_python(&[&part, &path(&experiment), &path(&args.out)])?;
        }
    }
    let [pool, oracle, baselines] = PARTS.map(|part| read(&args.out.join(format!("{part}.json"))));
    let verdict = judge::judge(&plan, &pool?, &oracle?);
    let report = json!({
        "config": config, "plan": plan, "verdict": verdict,
        "parts": PARTS.iter().map(|part| Ok(((*part).to_owned(), read(&args.out.join(format!("{part}.json")))?)))
            .collect::<Result<serde_json::Map<String, Value>, Failure>>()?,
    });
    write(&args.out.join("report.json"), &report)?;
    table::print(&judge::to_text(&verdict, &baselines?))?;
    if !args.judge && wants(args, PLOT) {
        run_python(&[PLOT, &path(&args.out.join("report.json")), &path(&args.out.join("report.svg"))])?;
    }
    if verdict.passed { Ok(()) } else { Err(Failure::Failed(format!("{}: failed", config.name))) }
}

fn parts(args: &Sessions, config: &Config) -> Result<Vec<String>, Failure> {
    let known = |part: &str| part == PLOT || PARTS.contains(&part);
    if let Some(unknown) = args.parts.iter().find(|part| !known(part)) {
        let all = PARTS.join(", ");
        return Err(Failure::Misuse(format!("no part is called {unknown:?}; there are {all}, {PLOT}")));
    }
    let all = args.parts.is_empty();
    let wanted = |part: &&&str| wants(args, part) && !(all && **part == "baselines" && !config.baselines);
    Ok(PARTS.iter().filter(wanted).map(|part| (*part).to_owned()).collect())
}

fn wants(args: &Sessions, part: &str) -> bool {
    args.parts.is_empty() || args.parts.iter().any(|one| one == part)
}

/// `python -m overspill.density ARGS`, by the interpreter that called us or the one on the path.
fn run_python(args: &[&str]) -> Result<(), Failure> {
    let python = std::env::var("OVERSPILL_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let status = Command::new(&python).args(["-m", "overspill.density"]).args(args).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Failure::Failed(format!("part {}: {status}", args[0]))),
        Err(error) => {
            Err(Failure::Failed(format!("{python}: {error}; it needs overspill, torch and transformers")))
        }
    }
}

fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn failed(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::Failed(format!("{}: {error}", path.display()))
}

/// A JSON file; null where there is none.
fn read(path: &Path) -> Result<Value, Failure> {
    if !path.exists() {
        return Ok(Value::Null);
    }
    let text = fs::read_to_string(path).map_err(|error| failed(path, &error))?;
    serde_json::from_str(&text).map_err(|error| failed(path, &error))
}

fn write(path: &Path, value: &Value) -> Result<(), Failure> {
    fs::write(path, format!("{value:#}\n")).map_err(|error| failed(path, &error))
}

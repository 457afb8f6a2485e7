//! `overspill chain`: every checkpoint of a training run in one folder.

use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};
use overspill_chain::{Chain, Error, Keep, PARAMS, Record};
use overspill_tpde::{Checkpoint, Options};
use serde_json::{Value, json};

use crate::Failure;
use crate::bar::Bar;
use crate::table::{columns, print, print_json};

/// The arguments of `overspill chain`.
#[derive(Debug, Parser)]
#[command(arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
    /// Show no progress bar and print nothing but what was asked for.
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Print the result as JSON.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make an empty chain.
    #[command(after_help = "Example:\n  overspill chain init runs/a.chain")]
    Init {
        /// The folder: new, or empty.
        chain: PathBuf,
    },
    /// Add a checkpoint as the next step.
    #[command(after_help = "Examples:
  overspill chain commit runs/a.chain --step 100 step-100.safetensors
  overspill chain commit runs/a.chain --step 200 step-200/ --moments optimizer-200.safetensors")]
    Commit {
        /// The chain.
        chain: PathBuf,
        /// Its number; steps only grow.
        #[arg(long)]
        step: u64,
        /// The weights: safetensors or a sharded checkpoint.
        params: PathBuf,
        /// The optimizer's moments, kept and counted apart.
        #[arg(long, value_name = "FILE")]
        moments: Option<PathBuf>,
    },
    /// List the steps and what each of them costs.
    #[command(
        after_help = "Examples:\n  overspill chain log runs/a.chain\n  overspill chain log runs/a.chain --json | jq '.[-1]'"
    )]
    Log {
        /// The chain.
        chain: PathBuf,
    },
    /// Write the checkpoint of a step, bit for bit.
    #[command(after_help = "Examples:
  overspill chain restore runs/a.chain --step 100 -o step-100.safetensors
  overspill chain restore runs/a.chain --step 100 --part moments -o optimizer-100.safetensors")]
    Restore {
        /// The chain.
        chain: PathBuf,
        /// The step; the newest if absent.
        #[arg(long)]
        step: Option<u64>,
        /// Which part of it.
        #[arg(long, default_value = PARAMS)]
        part: String,
        /// The checkpoint to write: a file, or a new folder where the state was sharded.
        #[arg(short, long, value_name = "B2")]
        output: PathBuf,
    },
    /// Check every byte of every object.
    #[command(
        after_help = "Examples:\n  overspill chain verify runs/a.chain\n  overspill chain verify runs/a.chain --decode"
    )]
    Verify {
        /// The chain.
        chain: PathBuf,
        /// Decode every step as well.
        #[arg(long)]
        decode: bool,
    },
    /// Drop steps that are not wanted, and what no step needs.
    #[command(after_help = "Examples:
  overspill chain gc runs/a.chain                          only what interrupted commits left
  overspill chain gc runs/a.chain --last 10 --every 1000   the newest 10, and every 1000th
  overspill chain gc runs/a.chain --after 500              drops what comes after step 500")]
    Gc {
        /// The chain.
        chain: PathBuf,
        /// Keep so many of the newest steps.
        #[arg(long)]
        last: Option<u64>,
        /// Keep steps that are multiples of this.
        #[arg(long)]
        every: Option<u64>,
        /// Drop the steps after this one.
        #[arg(long)]
        after: Option<u64>,
    },
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Tpde(error) => error.into(),
            Error::Misuse { what } => Failure::Misuse(what),
            error @ (Error::NoStep { .. } | Error::NotAChain { .. }) => Failure::Misuse(error.to_string()),
            error => Failure::Failed(error.to_string()),
        }
    }
}

fn open(chain: &Path) -> Result<Chain, Failure> {
    Ok(Chain::open(chain, Options::default())?)
}

pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let (quiet, as_json) = (args.quiet, args.json);
    let bar = |message| Bar::new(quiet || as_json, message);
    let say = |text: String, value: Value| match (as_json, quiet) {
        (true, _) => print_json(&value),
        (_, true) => Ok(()),
        _ => print(&text),
    };
    match args.command {
        Command::Init { chain } => {
            Chain::init(&chain, Options::default())?;
            say(format!("{}: an empty chain", chain.display()), json!({ "chain": chain }))
        }
        Command::Commit { chain, step, params, moments } => {
            let params = Checkpoint::open(&params)?;
            let moments = moments.as_deref().map(Checkpoint::open).transpose()?;
            let mut parts = vec![(PARAMS, &params)];
            parts.extend(moments.as_ref().map(|moments| ("moments", moments)));
            let record = {
                let bar = bar("committing");
                open(&chain)?.commit(step, &parts, &|done, total| bar.report(done, total))?
            };
            say(log_text(std::slice::from_ref(&record)), record_json(&record))
        }
        Command::Log { chain } => {
            let log = open(&chain)?.log()?;
            if as_json {
                return print_json(&json!(log.iter().map(record_json).collect::<Vec<_>>()));
            }
            print(&log_text(&log))
        }
        Command::Restore { chain, step, part, output } => {
            let chain = open(&chain)?;
            let newest = chain.steps()?.last().copied();
            let Some(step) = step.or(newest) else {
                return Err(Failure::Misuse("the chain is empty".into()));
            };
            {
                let bar = bar("restoring");
                chain.restore(step, &part, &output, &|done, total| bar.report(done, total))?;
            }
            let text = format!("{}: {part} of step {step}", output.display());
            say(text, json!({ "step": step, "part": part, "output": output }))
        }
        Command::Verify { chain, decode } => {
            let found = {
                let bar = bar("verifying");
                open(&chain)?.verify(decode, &|done, total| bar.report(done, total))?
            };
            let reach = if decode { ", every step decodes to the state it promises" } else { "" };
            say(
                format!(
                    "{} steps, {} objects, {} bytes are sound{reach}",
                    found.steps, found.objects, found.bytes
                ),
                json!({
                    "steps": found.steps, "objects": found.objects, "bytes": found.bytes, "decoded": found.decoded,
                }),
            )
        }
        Command::Gc { chain, last, every, after } => {
            let found = open(&chain)?.gc(Keep { last, every, up_to: after })?;
            say(
                format!(
                    "{} steps dropped, {} files removed, {} bytes",
                    found.steps.len(),
                    found.files,
                    found.bytes
                ),
                json!({ "steps": found.steps, "files": found.files, "bytes": found.bytes }),
            )
        }
    }
}

fn record_json(record: &Record) -> Value {
    let parts: serde_json::Map<String, Value> = record
        .parts
        .iter()
        .map(|(name, part)| {
            let value = json!({
                "role": part.role.name(), "state": part.state, "raw_bytes": part.raw_bytes,
                "new_bytes": part.new_bytes(), "patch_bytes": part.patch.bytes,
            });
            (name.clone(), value)
        })
        .collect();
    json!({ "step": record.step, "committed_s": record.committed_s, "parts": parts })
}

fn log_text(log: &[Record]) -> String {
    let mut rows =
        vec![["part", "step", "role", "raw", "added", "ratio", "state"].map(String::from).to_vec()];
    let (mut raw, mut added) = (0, 0);
    for record in log {
        for (name, part) in &record.parts {
            raw += part.raw_bytes;
            added += part.new_bytes();
            rows.push(vec![
                name.clone(),
                record.step.to_string(),
                part.role.name().to_owned(),
                part.raw_bytes.to_string(),
                part.new_bytes().to_string(),
                ratio(part.raw_bytes, part.new_bytes()),
                part.state.clone(),
            ]);
        }
    }
    if log.len() > 1 {
        let total = ["total", "", "", &raw.to_string(), &added.to_string(), &ratio(raw, added), ""];
        rows.push(total.map(String::from).to_vec());
    }
    columns(&rows)
}

fn ratio(raw: u64, packed: u64) -> String {
    format!("{:.2}", raw as f64 / packed.max(1) as f64)
}

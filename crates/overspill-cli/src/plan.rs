//! `overspill plan`: what a training step will need and cost under memory budgets, before anything runs.

use overspill_storm::{Limits, Link, Plan, Shape, Speeds, StepRecord, make_plan};
use serde_json::json;

use crate::{Failure, table};

/// A GPU as its vendor describes it: dense 16-bit matmuls with 32-bit sums.
struct Card {
    name: &'static str,
    memory_gb: f64,
    tflops: f64,
    memory_tbps: f64,
    /// One direction of the host link.
    link_gbps: f64,
    source: &'static str,
}

/// The link is what pinned copies reach: 55 GB/s was measured on Gen5 x16, and the same share of Gen4 is 27.
#[rustfmt::skip]
const CARDS: [Card; 5] = [
    Card { name: "h200", memory_gb: 141.0, tflops: 989.5, memory_tbps: 4.8, link_gbps: 55.0, source: "NVIDIA H200 Tensor Core GPU datasheet; PCIe Gen5 x16" },
    Card { name: "h100", memory_gb: 80.0, tflops: 989.5, memory_tbps: 3.35, link_gbps: 55.0, source: "NVIDIA H100 Tensor Core GPU datasheet, SXM; PCIe Gen5 x16" },
    Card { name: "a100", memory_gb: 80.0, tflops: 312.0, memory_tbps: 2.039, link_gbps: 27.0, source: "NVIDIA A100 80GB datasheet, SXM; PCIe Gen4 x16" },
    Card { name: "rtx4090", memory_gb: 25.769, tflops: 165.2, memory_tbps: 1.008, link_gbps: 27.0, source: "NVIDIA Ada GPU Architecture whitepaper, appendix A; 24 GiB; PCIe Gen4 x16" },
    Card { name: "rtx5090", memory_gb: 34.360, tflops: 209.5, memory_tbps: 1.792, link_gbps: 55.0, source: "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A; 32 GiB; PCIe Gen5 x16" },
];
/// Share of the vendor's matmul rate that one H200 reached: 737 TFLOP/s at 8192 cubed.
const MATMUL_SHARE: f64 = 0.745;

/// A named shape: layers, hidden, inner, width of keys, vocabulary; whether the head is the embedding.
const MODELS: [(&str, [u64; 5], bool); 5] = [
    ("llama-1b", [16, 2048, 8192, 512, 128_256], true),
    ("llama-3b", [28, 3072, 8192, 1024, 128_256], true),
    ("llama-8b", [32, 4096, 14_336, 1024, 128_256], false),
    ("llama-13b", [40, 5120, 13_824, 5120, 32_000], false),
    ("llama-70b", [80, 8192, 28_672, 1024, 128_256], false),
];

/// Prices a training step of a Llama-like model on a named card under memory budgets, before anything runs.
///
/// Activations are those of transformers' unfused Llama in 16 bit. Step times are arithmetic calibrated on one
/// H200 and are estimates elsewhere; the plan, its bytes and its peak are the planner's own. "coded" is what
/// is offloaded through the link codec, in bytes before it.
///
/// Examples:
///   overspill plan --model llama-8b --card h200 --batch 4 --sequence 4096
///   overspill plan --model llama-1b --card rtx4090 --sequence 32768 --optimizer adamw --fused-loss
///   overspill plan --model llama-8b --card rtx4090 --sequence 8192 --lora 16 --fused-loss --host-gb 48
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// llama-1b, llama-3b, llama-8b, llama-13b or llama-70b.
    #[arg(long)]
    model: String,
    /// h200, h100, a100, rtx4090 or rtx5090.
    #[arg(long)]
    card: String,
    /// Sequences of a batch.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    batch: u64,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u64).range(1..=16_777_216))]
    sequence: u64,
    /// As many layers as this instead of the model's.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1024))]
    layers: Option<u64>,
    /// States of the optimizer beside 16-bit weights and gradients: none, or adamw (two, in 16 bit).
    #[arg(long, default_value = "none", value_parser = ["none", "adamw"])]
    optimizer: String,
    /// Train low-rank adapters of this rank at queries and values, over frozen weights.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=4096))]
    lora: Option<u64>,
    /// Head and loss in one operation that never holds all logits, as Liger has it.
    #[arg(long)]
    fused_loss: bool,
    /// Offload through the link codec where that pays, as Storm(compress=True) does.
    #[arg(long)]
    compress: bool,
    /// GB (1e9 bytes) of host memory for what leaves; default: without end.
    #[arg(long)]
    host_gb: Option<f64>,
    /// GB (1e9 bytes) that may be in use in all; default: the card's less 6%, and halves and quarters of
    /// the activations where that is less.
    #[arg(long)]
    budget_gb: Option<f64>,
    /// GB/s (1e9 bytes) of the host link in one direction; default: what pinned copies reach on the card's.
    #[arg(long)]
    link_gbps: Option<f64>,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// One budget and the plan for it.
struct Priced {
    name: String,
    budget_bytes: u64,
    plan: Plan,
}

/// All that is shown, as a table or as JSON.
struct Report<'a> {
    card: &'a Card,
    shape: Shape,
    record: StepRecord,
    fixed_bytes: u64,
    alone_us: f64,
    gbps: f64,
    host_bytes: u64,
    priced: Vec<Priced>,
}

impl Priced {
    /// What keeps the step from being faster, or from running.
    fn binds(&self, host_bytes: u64) -> &'static str {
        let predicted = &self.plan.predicted;
        if predicted.peak_bytes > self.budget_bytes {
            "does not fit"
        } else if predicted.host_bytes > host_bytes {
            "does not fit the host"
        } else if predicted.offloaded_bytes + predicted.compressed_bytes + predicted.rebuilt_bytes == 0 {
            "nothing: all is kept"
        } else if predicted.stall_us + predicted.rebuild_us + predicted.codec_us < 1e-3 * predicted.step_us {
            "nothing: the link keeps up"
        } else if predicted.stall_us + predicted.codec_us > predicted.rebuild_us {
            "the link"
        } else {
            "rebuilding"
        }
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<(), Failure> {
    let card = named(&CARDS, &args.card, |card| card.name, "card")?;
    let (_, [layers, hidden, inner, kv, vocab], is_tied) =
        *named(&MODELS, &args.model, |model| model.0, "model")?;
    let layers = args.layers.unwrap_or(layers);
    let shape = Shape {
        layers,
        hidden,
        inner,
        kv,
        vocab,
        is_tied,
        adapter_rank: args.lora.unwrap_or(0),
        has_fused_loss: args.fused_loss,
        batch: args.batch,
        sequence: args.sequence,
    };
    let gbps = positive(args.link_gbps.unwrap_or(card.link_gbps), "--link-gbps")?;
    let host_bytes = match args.host_gb {
        Some(gb) => (positive(gb, "--host-gb")? * 1e9) as u64,
        None => u64::MAX,
    };
    let fixed_bytes = fixed_bytes(&shape, &args.optimizer);
    let speeds =
        Speeds { matmul_flops: card.tflops * 1e12 * MATMUL_SHARE, memory_bytes: card.memory_tbps * 1e12 };
    let mut record = shape.step(&speeds, fixed_bytes);
    if !args.compress {
        record.units.iter_mut().for_each(|unit| unit.coded = None);
    }
    let link = Link { offload_gbps: gbps, onboard_gbps: gbps };
    let priced = budgets(args, card, &record, fixed_bytes)?
        .into_iter()
        .map(|(name, budget_bytes)| {
            let limits = Limits { budget_bytes, lookahead_bytes: 0, slack_bytes: 0, host_bytes, link };
            Priced { name, budget_bytes, plan: make_plan(&record, &limits) }
        })
        .collect::<Vec<_>>();
    let alone_us = record.events.last().map_or(0.0, |event| event.time_us);
    let report = Report { card, shape, record, fixed_bytes, alone_us, gbps, host_bytes, priced };
    if args.json {
        return table::print_json(&to_json(&report));
    }
    table::print(&to_text(&report))
}

/// Weights, and gradients and states of those that are trained, all in 16 bit.
fn fixed_bytes(shape: &Shape, optimizer: &str) -> u64 {
    let beside = if optimizer == "adamw" { 3 } else { 1 };
    let frozen = if shape.adapter_rank > 0 { shape.parameters() } else { 0 };
    2 * (frozen + shape.trained() * (1 + beside))
}

/// The entry of `list` that is called `name`.
fn named<'a, T>(list: &'a [T], name: &str, of: impl Fn(&T) -> &str, what: &str) -> Result<&'a T, Failure> {
    list.iter().find(|&entry| of(entry) == name).ok_or_else(|| {
        let known: Vec<_> = list.iter().map(of).collect();
        Failure::Misuse(format!("no {what} is called {name:?}; there are {}", known.join(", ")))
    })
}

fn positive(value: f64, option: &str) -> Result<f64, Failure> {
    if value.is_finite() && value > 0.0 && value < 1e9 {
        return Ok(value);
    }
    Err(Failure::Misuse(format!("{option} has to be a positive number, not {value}")))
}

/// The budgets to price, by name.
fn budgets(
    args: &Args,
    card: &Card,
    record: &StepRecord,
    fixed_bytes: u64,
) -> Result<Vec<(String, u64)>, Failure> {
    if let Some(gb) = args.budget_gb {
        return Ok(vec![("stated".to_owned(), (positive(gb, "--budget-gb")? * 1e9) as u64)]);
    }
    let most = (card.memory_gb * 0.94e9) as u64;
    let shares = [2, 4].map(|share| (format!("{share}x"), fixed_bytes + record.unit_bytes() / share));
    let within = shares.into_iter().filter(|(_, bytes)| *bytes < most);
    Ok([("card".to_owned(), most)].into_iter().chain(within).collect())
}

fn gb(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / 1e9)
}

/// What would help where the first budget is not enough; empty where it is.
fn advice(report: &Report<'_>) -> String {
    let Report { shape, fixed_bytes, host_bytes, priced, .. } = report;
    let Some(Priced { budget_bytes, plan, .. }) = priced.first() else { return String::new() };
    let predicted = &plan.predicted;
    let mut said = String::new();
    if fixed_bytes > budget_bytes {
        said += "\nWeights and what is trained beside them do not fit, and STORM moves neither.";
        if shape.adapter_rank == 0 {
            let adapted = Shape { adapter_rank: 16, ..*shape };
            said += &format!(" With --lora 16 they take {} GB.", gb(self::fixed_bytes(&adapted, "adamw")));
        }
    } else if predicted.peak_bytes > *budget_bytes {
        said += &format!("\nNo plan found needs less than {} GB.", gb(predicted.peak_bytes));
        if !shape.has_fused_loss && shape.vocab > 0 {
            let logits = 2 * shape.tokens() * shape.vocab;
            said += &format!(" --fused-loss leaves out logits of {} GB, several times.", gb(logits));
        }
    } else if predicted.host_bytes > *host_bytes {
        said += &format!("\nNo plan found sends less than {} GB to the host.", gb(predicted.host_bytes));
    }
    said
}

fn to_text(report: &Report<'_>) -> String {
    let Report { card, shape, record, fixed_bytes, alone_us, gbps, host_bytes, priced } = report;
    let header = [
        "budget",
        "GB",
        "peak",
        "kept",
        "rebuilt",
        "offloaded",
        "coded",
        "step ms",
        "over keep-all",
        "binds",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for entry in priced {
        let predicted = &entry.plan.predicted;
        rows.push(vec![
            entry.name.clone(),
            gb(entry.budget_bytes),
            gb(predicted.peak_bytes),
            gb(predicted.kept_bytes),
            gb(predicted.rebuilt_bytes),
            gb(predicted.offloaded_bytes),
            gb(predicted.compressed_bytes),
            format!("{:.0}", predicted.step_us / 1e3),
            format!("{:+.1}%", (predicted.step_us / alone_us - 1.0) * 100.0),
            entry.binds(*host_bytes).to_owned(),
        ]);
    }
    format!(
        "{} layers, {:.2} billion weights, {} x {} tokens on {} ({} GB, {} TFLOP/s, {} TB/s; {}), link {gbps} GB/s\n\
         weights, gradients and optimizer {} GB; activations {} GB; keep-all peaks at {} GB and takes {:.0} ms\n\n{}{}",
        shape.layers,
        shape.parameters() as f64 / 1e9,
        shape.batch,
        shape.sequence,
        card.name,
        card.memory_gb,
        card.tflops,
        card.memory_tbps,
        card.source,
        gb(*fixed_bytes),
        gb(record.unit_bytes()),
        gb(record.keep_all_peak_bytes()),
        alone_us / 1e3,
        table::columns(&rows),
        advice(report)
    )
}

fn to_json(report: &Report<'_>) -> serde_json::Value {
    let Report { card, shape, record, fixed_bytes, alone_us, gbps, host_bytes, priced } = report;
    let plans: Vec<_> = priced
        .iter()
        .map(|entry| {
            json!({
                "budget": entry.name,
                "budget_bytes": entry.budget_bytes,
                "predicted": entry.plan.predicted,
                "binds": entry.binds(*host_bytes),
            })
        })
        .collect();
    json!({
        "card": card.name,
        "card_source": card.source,
        "link_gbps": gbps,
        "parameters": shape.parameters(),
        "trained": shape.trained(),
        "fixed_bytes": fixed_bytes,
        "activation_bytes": record.unit_bytes(),
        "keep_all_peak_bytes": record.keep_all_peak_bytes(),
        "keep_all_us": alone_us,
        "plans": plans,
    })
}

//! `overspill plan`, run as a program.

use std::process::{Command, Output};

fn plan(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_overspill")).arg("plan").args(args).output().expect("runs")
}

fn document(args: &[&str]) -> serde_json::Value {
    let out = plan(&[args, &["--json"]].concat());
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).expect("JSON")
}

#[test]
fn the_8b_shape_has_its_weights_and_its_plans_keep_their_budgets() {
    let found = document(&["--model", "llama-8b", "--card", "h200", "--batch", "2"]);
    // Llama 3.1 8B has 8,030,261,248 weights.
    assert_eq!(found["parameters"], 8_030_261_248_u64);
    // Llama 3.2 1B has 1,235,814,400, with a head that is its embedding.
    let small = document(&["--model", "llama-1b", "--card", "rtx5090"]);
    assert_eq!(small["parameters"], 1_235_814_400_u64);
    let plans = found["plans"].as_array().expect("plans");
    assert_eq!(plans.len(), 3);
    for plan in plans {
        let budget = plan["budget_bytes"].as_u64().expect("bytes");
        assert!(plan["predicted"]["peak_bytes"].as_u64().expect("bytes") <= budget, "{plan}");
        assert!(plan["predicted"]["step_us"].as_f64() >= found["keep_all_us"].as_f64(), "{plan}");
    }
    assert_eq!(plans[0]["binds"], "nothing: all is kept");
}

#[test]
fn every_card_and_model_has_a_table() {
    for card in ["h200", "h100", "a100", "rtx4090", "rtx5090"] {
        for model in ["llama-1b", "llama-3b", "llama-8b", "llama-13b", "llama-70b"] {
            let out = plan(&["--model", model, "--card", card, "--layers", "4", "--optimizer", "adamw"]);
            let text = String::from_utf8_lossy(&out.stdout);
            assert!(out.status.success() && text.contains("over keep-all"), "{text}");
        }
    }
}

#[test]
fn what_cannot_fit_is_said() {
    let found = document(&["--model", "llama-8b", "--card", "rtx4090", "--optimizer", "adamw"]);
    assert_eq!(found["plans"][0]["binds"], "does not fit");
    let out = plan(&["--model", "llama-8b", "--card", "rtx4090", "--optimizer", "adamw"]);
    assert!(String::from_utf8_lossy(&out.stdout).contains("--lora 16"), "{out:?}");
    let out = plan(&["--model", "llama-1b", "--card", "rtx4090", "--sequence", "32768"]);
    assert!(String::from_utf8_lossy(&out.stdout).contains("--fused-loss"), "{out:?}");
}

#[test]
fn the_codec_is_for_those_who_ask() {
    let args =
        ["--model", "llama-8b", "--card", "h100", "--link-gbps", "10", "--batch", "4", "--layers", "16"];
    let compressed = |args: &[&str]| {
        let plans = document(args)["plans"].as_array().expect("plans").clone();
        plans.iter().map(|plan| plan["predicted"]["compressed_bytes"].as_u64().expect("bytes")).sum::<u64>()
    };
    assert_eq!(compressed(&args), 0);
    assert!(compressed(&[&args[..], &["--compress"]].concat()) > 0);
}

/// What most owners of 24 GB ask: every weight of a small model over a long text, and adapters of an 8B one.
#[test]
fn a_card_of_24_gb_gets_an_answer() {
    let small = ["--model", "llama-1b", "--card", "rtx4090", "--sequence", "32768", "--optimizer", "adamw"];
    let adapters = ["--model", "llama-8b", "--card", "rtx4090", "--sequence", "8192", "--lora", "16"];
    for args in [&small[..], &adapters[..]] {
        let found = document(&[args, &["--fused-loss", "--host-gb", "48"]].concat());
        assert!(found["keep_all_peak_bytes"].as_f64() > Some(25.769e9), "{found}");
        let predicted = &found["plans"][0]["predicted"];
        assert!(predicted["peak_bytes"].as_f64() <= Some(0.94 * 25.769e9), "{found}");
        assert!(predicted["host_bytes"].as_f64() <= Some(48e9), "{found}");
    }
    // peft's adapters on transformers' Llama save 90.5 GB at 16,384 tokens, measured.
    let long =
        ["--model", "llama-8b", "--card", "rtx4090", "--sequence", "16384", "--lora", "16", "--fused-loss"];
    let saved = document(&long)["activation_bytes"].as_f64().expect("bytes");
    assert!((saved / 90.5e9 - 1.0).abs() < 0.02, "{saved}");
    // Rank 16 at queries (4096 in and out) and values (1024 out) of 32 layers.
    assert_eq!(document(&adapters)["trained"], 32 * 16 * (4096 + 4096 + 4096 + 1024));
}

#[test]
fn misuse_is_named() {
    for (args, said) in [
        (vec!["--model", "llama-9b", "--card", "h200"], "llama-8b"),
        (vec!["--model", "llama-8b", "--card", "voodoo"], "rtx4090"),
        (vec!["--model", "llama-8b", "--card", "h200", "--link-gbps=-1"], "positive"),
        (vec!["--model", "llama-8b", "--card", "h200", "--budget-gb", "nan"], "positive"),
        (vec!["--model", "llama-8b", "--card", "h200", "--batch", "0"], "0"),
    ] {
        let out = plan(&args);
        let text = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{args:?}: {text}");
        assert!(text.contains(said), "{args:?}: {text}");
    }
}

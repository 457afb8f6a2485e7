//! Bytes that no encoder wrote, given to the decoder of one mode.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use overspill_codec::ChunkMode;
use overspill_fuzz::{Case, cases, decode_damaged};

static CASES: LazyLock<Vec<Case>> = LazyLock::new(|| cases(ChunkMode::Groups));

fuzz_target!(|input: &[u8]| decode_damaged(&CASES, ChunkMode::Groups, input));

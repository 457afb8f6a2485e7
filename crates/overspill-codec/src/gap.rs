//! Gaps between events of a class, in units of the class's own words: geometric, so coded as a quotient by a fixed
//! table and low bits as they are.
//!
//! A class's change probability is written as `rate` j: p = 2^(-j/4). Up to j = 15 the quotient is the gap itself
//! (k = 0); beyond, k = (j - 12) / 4 low bits are split off so that p 2^k stays between 2^-3 and 2^-3.75 and four
//! tables serve every rate. Symbol 63 adds 63 to the quotient and is followed by another symbol.

use std::sync::LazyLock;

use crate::rans::{PROB_TOTAL, SymbolTable};

/// Smallest rate that gaps are coded for (p = 0.354); denser classes get a symbol for every word.
pub(crate) const RATE_MIN: u32 = 6;
/// Largest rate (p = 2^-24).
pub(crate) const RATE_MAX: u32 = 96;
/// The quotient symbol that another one follows, and what it adds.
pub(crate) const ESCAPE: u8 = 63;

/// Probability, in units of 2^-16, that a quotient is followed by a larger one, for rates 6 to 15: `1 - p`
/// up to rate 11, and `exp(-p)`, the limit for many low bits, for the four tables that rates from 12 on share.
const CONTINUE: [u64; 10] = [42366, 46052, 49152, 51759, 53951, 55794, 57835, 58997, 59992, 60842];

static TABLES: LazyLock<[SymbolTable; 10]> = LazyLock::new(|| CONTINUE.map(quotient_table));

/// Low bits of a gap under a rate.
pub(crate) fn low_bits(rate: u32) -> u32 {
    if rate < 16 { 0 } else { (rate - 12) / 4 }
}

/// The quotient table of a rate.
pub(crate) fn table(rate: u32) -> &'static SymbolTable {
    let index = if rate < 16 { rate } else { 12 + rate % 4 };
    &TABLES[(index - RATE_MIN) as usize]
}

/// The rate of `events` among `words`, which may be an estimate.
pub(crate) fn rate_of(events: f64, words: f64) -> u32 {
    let rate = (-4.0 * (events / words.max(events)).log2()).round();
    rate.min(f64::from(RATE_MAX)) as u32
}

/// Bits that `events` among `words` cost at a rate: the geometric code's mean.
pub(crate) fn cost_bits(events: f64, words: f64, rate: u32) -> f64 {
    let p = (-f64::from(rate) / 4.0).exp2();
    -(events * p.log2() + (words - events).max(0.0) * (1.0 - p).log2())
}

/// Bits of each quotient symbol of a rate.
pub(crate) fn costs_bits(rate: u32) -> Vec<f64> {
    (0..=usize::from(ESCAPE)).map(|symbol| table(rate).cost_bits(symbol)).collect()
}

/// Bits of one gap at a rate whose [`costs_bits`] are `costs`.
pub(crate) fn one_bits(costs: &[f64], gap: u32, rate: u32) -> f64 {
    let (quotient, escape) = (gap >> low_bits(rate), u32::from(ESCAPE));
    costs[(quotient % escape) as usize]
        + f64::from(quotient / escape) * costs[escape as usize]
        + f64::from(low_bits(rate))
}

/// Frequencies of a geometric law: f(q) = max(1, floor(4096 t(q) / 2^32)) for q < 63, with t(0) = (2^16 - c) 2^16
/// and t(q + 1) = floor(t(q) c / 2^16); symbol 63 takes max(1, floor(4096 c^63 / ...)), computed as the
/// recurrence's tail t(63) 2^16 / (2^16 - c); symbol 0 takes what is missing to, or gives what exceeds, 4096.
fn quotient_table(carry: u64) -> SymbolTable {
    let mut frequencies = [0u16; ESCAPE as usize + 1];
    let mut t = (65536 - carry) << 16;
    for f in &mut frequencies[..ESCAPE as usize] {
        *f = ((t >> 20) as u16).max(1);
        t = (t * carry) >> 16;
    }
    frequencies[ESCAPE as usize] = (((t / (65536 - carry)) >> 4) as u16).max(1);
    let rest: u32 = frequencies[1..].iter().map(|&f| u32::from(f)).sum();
    frequencies[0] = (PROB_TOTAL - rest) as u16;
    SymbolTable::new(&frequencies)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_costs_within_two_percent_of_the_entropy_of_its_rate() {
        for rate in RATE_MIN..60 {
            let p = (-f64::from(rate) / 4.0).exp2();
            let (table, k) = (table(rate), low_bits(rate));
            let (mut mean_bits, mut left) = (0.0, 1.0f64);
            let stay = (1.0 - p).powf((1u64 << k) as f64);
            let mut escapes = 0.0;
            for q in 0..2000usize {
                if q > 0 && q % 63 == 0 {
                    escapes += table.cost_bits(63);
                }
                mean_bits += left * (1.0 - stay) * (table.cost_bits(q % 63) + escapes + f64::from(k));
                left *= stay;
            }
            let entropy = cost_bits(1.0, 1.0 / p, rate);
            assert!(mean_bits < entropy * 1.02, "rate {rate}: {mean_bits} bits for {entropy}");
        }
    }
}

//! Mode S: positions of changed words by class, and their values.
//!
//! Payload after the mode byte:
//! - counts, a bit stream padded to bytes: log2 of the lanes K (3 bits); order g (4 bits); with row context,
//!   the gap symbols of the rows (exp-Golomb g); per class that is not still, the signed difference of its count of
//!   symbols to the count before it, at first 0 (exp-Golomb g);
//! - K lane states, packed, and the word stream of [`crate::rans`]: row gaps, gaps of each
//!   class in ascending order, then for each class its value symbols;
//! - the raw bits, two streams each padded to bytes. First, per row gap and per gap of each class: its low (or raw)
//!   bits and, for a step, its sign. Second, in the order of the value symbols: for a word of a dense class that
//!   changed its sign, then the symbol's raw bits. The first 2 K bytes of the two streams together stand in the
//!   low halves of the states that decoding ends in (padded with zeros where they are shorter), the rest follows.
//!
//! Ranks count the words of a class within the chunk, in rows that changed if rows are context.

use std::ops::Range;

use crate::CodecError;
use crate::bits::{BitReader, BitWriter};
use crate::classes::{Class, ClassKind, ClassPlan, KeyMap};
use crate::gap;
use crate::rans::{Decoder, Encoder, MAX_LANES, STATE_LOW, SymbolTable};
use crate::scan::{BLOCK, ClassEvents, ValueMap, bits_at};
use crate::segment::{BaseKind, PatchKind, SegmentSpec};
use crate::simd;
use crate::tables::{
    Frequencies, MAX_SYMBOLS, entropy_bits, exp_golomb_bits, get_exp_golomb, get_signed, put_exp_golomb,
    put_signed,
};
use crate::values::{join_word, magnitude_of, sign_magnitude, split_magnitude, split_word, step_of};
use crate::words::{OrderMap, Word};

/// Classes with fewer changes keep geometric gaps: a table would hardly pay.
const CLUSTER_EVENTS_MIN: u64 = 64;

/// The head's tables for mode S.
#[derive(Debug)]
pub(crate) struct SparseTables {
    /// Rate of changed rows, if rows are context.
    pub(crate) row_rate: Option<u32>,
    pub(crate) classes: Vec<Class>,
    /// Whether the classes are those of mode F.
    pub(crate) flags: bool,
}

/// How a segment's words are keyed and compared.
pub(crate) fn maps(spec: &SegmentSpec) -> (KeyMap, ValueMap) {
    let is_step = spec.kind == PatchKind::Relative && spec.base != BaseKind::None;
    let order = OrderMap { is_float: spec.dtype.float_layout().is_some() };
    (KeyMap::new(spec.dtype, is_step), ValueMap { order, is_step })
}

/// Rows that a chunk touches: the offset of the chunk's first word in its row, and how many rows.
pub(crate) fn chunk_rows(spec: &SegmentSpec, first_word: usize, words: usize) -> (usize, usize) {
    let offset = ((spec.first_word + first_word as u64) % spec.row_words) as usize;
    (offset, (offset + words).div_ceil(spec.row_words as usize))
}

/// Word ranges of `rows` (ascending), clipped to the chunk, adjacent ones joined.
fn row_ranges(rows: &[u32], offset: usize, row_words: usize, words: usize) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for &row in rows {
        let start = (row as usize * row_words).saturating_sub(offset);
        let end = ((row as usize + 1) * row_words - offset).min(words);
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    ranges
}

/// Rows of a chunk of `words` words with a change in them; `changed` has a bit for each word.
fn changed_rows(changed: &[u64], offset: usize, row_words: usize, words: usize) -> Vec<u32> {
    let mut rows = Vec::new();
    let (mut start, mut row) = (0, 0);
    while start < words {
        let end = ((row as usize + 1) * row_words - offset).min(words);
        let mut blocks = (start..end).step_by(BLOCK);
        if blocks.any(|block| bits_at(changed, block, BLOCK.min(end - block)) != 0) {
            rows.push(row);
        }
        (start, row) = (end, row + 1);
    }
    rows
}

/// What changed in one chunk.
pub(crate) struct Changes<W> {
    /// Rows with a change, if rows are context.
    rows: Vec<u32>,
    /// Of each class that is not still, in order.
    events: Vec<ClassEvents<W>>,
}

/// Find the changes of a chunk. `changed` has a bit for each word and `values` what changed words are coded as, both
/// from the chunk's first word on; `first_word` counts within the segment.
pub(crate) fn gather<W: Word>(
    old: &[u8],
    (changed, values): (&[u64], &[W]),
    plans: &[ClassPlan],
    row_context: bool,
    spec: &SegmentSpec,
    first_word: usize,
) -> Changes<W> {
    let (keys, _) = maps(spec);
    let words = old.len() / W::BYTES;
    let mut events = Vec::new();
    let mut low = 0;
    for plan in plans {
        if plan.kind != ClassKind::Still {
            events.push(ClassEvents { low, high: plan.high, ..ClassEvents::default() });
        }
        low = plan.high.saturating_add(1);
    }
    if let Some(last) = events.last_mut().filter(|_| plans.last().is_some_and(|p| p.kind != ClassKind::Still))
    {
        last.high = 255;
    }
    let mut rows = Vec::new();
    let mut ranges: Vec<Range<usize>> = std::iter::once(0..words).collect();
    if row_context {
        let (offset, _) = chunk_rows(spec, first_word, words);
        rows = changed_rows(changed, offset, spec.row_words as usize, words);
        ranges = row_ranges(&rows, offset, spec.row_words as usize, words);
    }
    simd::collect_events(old, changed, values, &ranges, keys, &mut events);
    Changes { rows, events }
}

/// Give classes whose gaps are far from geometric a table of their own, where that saves bits.
pub(crate) fn find_clusters<W: Word>(plans: &mut [ClassPlan], chunks: &[Changes<W>]) {
    let live = plans.iter_mut().filter(|plan| plan.kind != ClassKind::Still);
    for (class, plan) in live.enumerate() {
        let ClassKind::Gaps(rate) = plan.kind else { continue };
        let mut counts = [0u64; MAX_SYMBOLS];
        let (mut raw_bits, mut geometric_bits) = (0, 0.0);
        let costs = gap::costs_bits(rate);
        for events in chunks.iter().map(|chunk| &chunk.events[class]) {
            let mut next = 0;
            for &rank in &events.ranks {
                let (symbol, width, _) = split_magnitude::<u32>(u64::from(rank - next));
                counts[usize::from(symbol)] += 1;
                raw_bits += u64::from(width);
                geometric_bits += gap::one_bits(&costs, rank - next, rate);
                next = rank + 1;
            }
        }
        let gaps = counts.iter().sum::<u64>();
        // Whatever the table, the data costs its entropy.
        let least_bits = raw_bits as f64 + gaps as f64 * entropy_bits(&counts);
        if gaps < CLUSTER_EVENTS_MIN || least_bits + 8.0 > geometric_bits {
            continue;
        }
        let (gaps, bits) = Frequencies::fit(&counts);
        if bits + raw_bits as f64 + 8.0 < geometric_bits {
            plan.kind = ClassKind::Clustered;
            plan.gaps = Some(gaps);
        }
    }
}

/// Append the payload of one chunk.
pub(crate) fn encode<W: Word>(
    changes: &Changes<W>,
    tables: &SparseTables,
    spec: &SegmentSpec,
    out: &mut Vec<u8>,
) {
    let live = || tables.classes.iter().filter(|class| class.kind != ClassKind::Still);
    let mut coder = Coder::new(maps(spec).1);
    let row_symbols = tables.row_rate.map(|rate| coder.gaps::<W>(&changes.rows, &[], rate));
    let mut counts = Vec::with_capacity(changes.events.len());
    for (class, events) in live().zip(&changes.events) {
        counts.push(match (class.kind, &class.gaps) {
            (ClassKind::Gaps(rate), _) => coder.gaps(&events.ranks, &events.values, rate),
            (_, Some(table)) => coder.clustered_gaps(events, table),
            _ => u64::from(events.population),
        });
    }
    for (class, events) in live().zip(&changes.events) {
        coder.values(class, events);
    }
    coder.finish(row_symbols, &counts, out);
}

/// Gathers the symbols and raw bits of a chunk.
struct Coder {
    map: ValueMap,
    symbols: Encoder,
    fixed: BitWriter,
    raw: BitWriter,
}

impl Coder {
    fn new(map: ValueMap) -> Self {
        Coder { map, symbols: Encoder::default(), fixed: BitWriter::new(), raw: BitWriter::new() }
    }

    /// Gap symbols of ascending ranks, and their low bits and signs. Returns how many symbols.
    fn gaps<W: Word>(&mut self, ranks: &[u32], values: &[W], rate: u32) -> u64 {
        let before = self.symbols.len();
        let (table, k) = (gap::table(rate), gap::low_bits(rate));
        let mut next = 0;
        for (i, &rank) in ranks.iter().enumerate() {
            let gap = rank - next;
            next = rank + 1;
            let mut quotient = gap >> k;
            while quotient >= u32::from(gap::ESCAPE) {
                self.symbols.push(table, gap::ESCAPE.into());
                quotient -= u32::from(gap::ESCAPE);
            }
            self.symbols.push(table, quotient as usize);
            self.fixed.put(u64::from(gap), k);
            if let (true, Some(&value)) = (self.map.is_step, values.get(i)) {
                self.fixed.put(sign_magnitude(value).0, 1);
            }
        }
        (self.symbols.len() - before) as u64
    }

    /// Gap symbols by a class's own table, their raw bits and signs. Returns how many symbols.
    fn clustered_gaps<W: Word>(&mut self, events: &ClassEvents<W>, table: &SymbolTable) -> u64 {
        let mut next = 0;
        for (&rank, &value) in events.ranks.iter().zip(&events.values) {
            let (symbol, width, raw) = split_magnitude::<u32>(u64::from(rank - next));
            next = rank + 1;
            self.symbols.push(table, symbol.into());
            self.fixed.put(raw, width);
            if self.map.is_step {
                self.fixed.put(sign_magnitude(value).0, 1);
            }
        }
        events.ranks.len() as u64
    }

    fn values<W: Word>(&mut self, class: &Class, events: &ClassEvents<W>) {
        let Some(table) = &class.values else { return };
        let dense = class.kind == ClassKind::Dense;
        let mut next = 0;
        for (&rank, &value) in events.ranks.iter().zip(&events.values) {
            if !self.map.is_step {
                let (symbol, raw) = split_word(value, self.map.order.is_float);
                self.symbols.push(table, symbol.into());
                self.raw.put(raw, W::BITS - 8);
                continue;
            }
            let (sign, magnitude) = sign_magnitude(value);
            if dense {
                (next..rank).for_each(|_| self.symbols.push(table, 0));
                next = rank + 1;
                self.raw.put(sign, 1);
            }
            let (symbol, width, raw) = split_magnitude::<W>(magnitude);
            self.symbols.push(table, symbol.into());
            self.raw.put(raw, width);
        }
        if dense {
            (next..events.population).for_each(|_| self.symbols.push(table, 0));
        }
    }

    fn finish(self, row_symbols: Option<u64>, counts: &[u64], out: &mut Vec<u8>) {
        let mut raw = self.fixed.finish();
        raw.extend_from_slice(&self.raw.finish());
        // A lane costs about a byte and gains parallelism: one for every 256 bytes, and a warp's from 1.5 KiB on.
        let estimate_bytes = raw.len() + self.symbols.len() / 2;
        let lanes_log2 =
            if estimate_bytes < 1536 { (estimate_bytes / 256).max(1).ilog2() } else { MAX_LANES.ilog2() };
        let mut header = BitWriter::new();
        header.put(u64::from(lanes_log2), 3);
        let differences = || {
            counts.iter().scan(0i64, |last, &count| {
                let difference = count as i64 - *last;
                *last = count as i64;
                Some(difference)
            })
        };
        let bits = |g: u32| {
            let rows = row_symbols.map_or(0, |count| exp_golomb_bits(count, g));
            rows + differences().map(|d| exp_golomb_bits(((d << 1) ^ (d >> 63)) as u64, g)).sum::<u64>()
        };
        let g = (0..16).min_by_key(|&g| bits(g)).expect("sixteen orders");
        header.put(u64::from(g), 4);
        if let Some(count) = row_symbols {
            put_exp_golomb(&mut header, count, g);
        }
        differences().for_each(|d| put_signed(&mut header, d, g));
        out.extend_from_slice(&header.finish());
        let mut seeds = [STATE_LOW; MAX_LANES];
        let seeds = &mut seeds[..1 << lanes_log2];
        let mut halves = raw.chunks(2);
        for seed in seeds.iter_mut() {
            let half = halves.next().unwrap_or_default();
            *seed |= half.iter().rev().fold(0, |sum, &byte| sum << 8 | u32::from(byte));
        }
        self.symbols.finish_packed(seeds, out);
        out.extend_from_slice(raw.get(seeds.len() * 2..).unwrap_or_default());
    }
}

/// Apply a payload (without its mode byte) to base words, in place.
pub(crate) fn apply<W: Word>(
    body: &[u8],
    tables: &SparseTables,
    spec: &SegmentSpec,
    first_word: usize,
    words: &mut [u8],
) -> Result<(), CodecError> {
    let (keys, map) = maps(spec);
    let count = words.len() / W::BYTES;
    let rows = tables.row_rate.map(|_| chunk_rows(spec, first_word, count));
    let (changed, events) = decode::<W>(body, tables, map, count, rows.map(|rows| rows.1))?;
    let ranges = match rows {
        Some((offset, _)) => row_ranges(&changed, offset, spec.row_words as usize, count),
        None => std::iter::once(0..count).collect(),
    };
    if simd::apply_events(words, &ranges, keys, map, &events) {
        Ok(())
    } else {
        Err(bad("a change beyond its class"))
    }
}

fn bad(why: &'static str) -> CodecError {
    CodecError::malformed("sparse chunk", why)
}

/// What the gaps of one class (or of the rows) are before their raw bits are added.
struct GapSymbols {
    symbols: Vec<u8>,
    /// Gaps that the symbols make: an escape makes none.
    gaps: usize,
    /// Width of the low bits of a gap whose symbol is a quotient; `None` in a clustered class.
    low_bits: Option<u32>,
}

impl GapSymbols {
    fn quotients(decoder: &mut Decoder<'_>, symbols: u64, rate: u32) -> Result<Self, CodecError> {
        let symbols = take_symbols(decoder, symbols, gap::table(rate))?;
        if symbols.last() == Some(&gap::ESCAPE) {
            return Err(bad("gaps end in an escape"));
        }
        let gaps = symbols.iter().map(|&symbol| usize::from(symbol != gap::ESCAPE)).sum();
        Ok(GapSymbols { symbols, gaps, low_bits: Some(gap::low_bits(rate)) })
    }

    fn clustered(decoder: &mut Decoder<'_>, symbols: u64, table: &SymbolTable) -> Result<Self, CodecError> {
        let symbols = take_symbols(decoder, symbols, table)?;
        Ok(GapSymbols { gaps: symbols.len(), symbols, low_bits: None })
    }

    /// Ranks, with the raw bits of each gap; the sign bit that follows each gap, if one does, goes to `signs`.
    fn ranks(
        &self,
        limit: usize,
        bits: &mut BitReader<'_>,
        mut signs: Option<&mut Vec<u8>>,
    ) -> Result<Vec<u32>, CodecError> {
        let (mut ranks, mut next, mut escaped) = (Vec::with_capacity(self.gaps), 0u64, 0u64);
        for &symbol in &self.symbols {
            let (least, width) = match self.low_bits {
                Some(_) if symbol == gap::ESCAPE => {
                    escaped += u64::from(symbol);
                    continue;
                }
                Some(k) => ((std::mem::take(&mut escaped) + u64::from(symbol)) << k, k),
                None => magnitude_of::<u32>(symbol).ok_or(bad("a gap beyond 32 bits"))?,
            };
            let field = bits.get(width + u32::from(signs.is_some()))?;
            let rank = next + least + (field & ((1 << width) - 1));
            if rank >= limit as u64 {
                return Err(bad("a position beyond the chunk"));
            }
            ranks.push(rank as u32);
            next = rank + 1;
            if let Some(signs) = &mut signs {
                signs.push((field >> width) as u8);
            }
        }
        Ok(ranks)
    }
}

/// The next symbols of one table.
fn take_symbols(decoder: &mut Decoder<'_>, count: u64, table: &SymbolTable) -> Result<Vec<u8>, CodecError> {
    let mut symbols = vec![0; count as usize];
    simd::decode_next(decoder, table, &mut symbols)?;
    Ok(symbols)
}

type Decoded<W> = (Vec<u32>, Vec<ClassEvents<W>>);

/// The changed rows and the events of each live class.
fn decode<W: Word>(
    body: &[u8],
    tables: &SparseTables,
    map: ValueMap,
    words: usize,
    rows: Option<usize>,
) -> Result<Decoded<W>, CodecError> {
    if tables.flags {
        return Err(bad("classes of mode F"));
    }
    let live: Vec<&Class> = tables.classes.iter().filter(|class| class.kind != ClassKind::Still).collect();
    let mut header = BitReader::new(body);
    let lanes_log2 = header.get(3)?;
    if lanes_log2 > 5 {
        return Err(bad("more than 32 lanes"));
    }
    let lanes = 1usize << lanes_log2;
    let g = header.get(4)? as u32;
    let row_symbols = if rows.is_some() { get_exp_golomb(&mut header, g)? } else { 0 };
    let mut counts = Vec::with_capacity(live.len());
    let (mut last, mut total) = (0i64, row_symbols);
    for _ in &live {
        last += get_signed(&mut header, g)?;
        counts.push(u64::try_from(last).map_err(|_| bad("a negative count"))?);
        total = total.saturating_add(last as u64);
    }
    if total > 2 * words as u64 {
        return Err(bad("more symbols than words"));
    }
    let body = &body[header.bytes_read()..];

    // Every symbol a step, then every raw bit: the raw bits start where the words end.
    let mut decoder = Decoder::new_packed(body, lanes)?;
    let row_gaps =
        tables.row_rate.map(|rate| GapSymbols::quotients(&mut decoder, row_symbols, rate)).transpose()?;
    let mut gaps = Vec::with_capacity(live.len());
    for (class, &count) in live.iter().zip(&counts) {
        gaps.push(match (class.kind, &class.gaps) {
            (ClassKind::Gaps(rate), _) => Some(GapSymbols::quotients(&mut decoder, count, rate)?),
            (_, Some(table)) => Some(GapSymbols::clustered(&mut decoder, count, table)?),
            _ => None,
        });
    }
    let mut symbols = Vec::with_capacity(live.len());
    for ((class, &count), gaps) in live.iter().zip(&counts).zip(&gaps) {
        let count = gaps.as_ref().map_or(count, |gaps| gaps.gaps as u64);
        symbols.push(match &class.values {
            Some(table) => take_symbols(&mut decoder, count, table)?,
            None => vec![1; count as usize],
        });
    }
    let mut raw = Vec::new();
    for state in &decoder.states[..lanes] {
        if state >> 16 != 1 {
            return Err(bad("a lane does not end in its seed"));
        }
        raw.extend_from_slice(&(*state as u16).to_le_bytes());
    }
    raw.extend_from_slice(decoder.rest());

    let mut fixed = BitReader::new(&raw);
    let changed = match (&row_gaps, rows) {
        (Some(gaps), Some(rows)) => gaps.ranks(rows, &mut fixed, None)?,
        _ => Vec::new(),
    };
    let mut signs = Vec::new();
    let mut events = Vec::with_capacity(live.len());
    for (class, gaps) in live.iter().zip(&gaps) {
        let mut own = ClassEvents { low: class.low, high: class.high, ..ClassEvents::default() };
        if let Some(gaps) = gaps {
            own.ranks = gaps.ranks(words, &mut fixed, map.is_step.then_some(&mut signs))?;
        }
        events.push(own);
    }
    let mut rest = BitReader::new(&raw[fixed.bytes_read()..]);
    let mut signs = signs.into_iter();
    for ((class, own), symbols) in live.iter().zip(&mut events).zip(&symbols) {
        read_values(class, own, symbols, map, &mut signs, &mut rest)?;
    }
    let used = fixed.bytes_read() + rest.bytes_read();
    if used.max(lanes * 2) != raw.len() || raw[used..].iter().any(|&byte| byte != 0) {
        return Err(bad("bytes left over"));
    }
    events.retain(|own| !own.ranks.is_empty());
    Ok((changed, events))
}

/// Values of one class from its symbols, and the ranks as well if it is dense.
fn read_values<W: Word>(
    class: &Class,
    own: &mut ClassEvents<W>,
    symbols: &[u8],
    map: ValueMap,
    signs: &mut impl Iterator<Item = u8>,
    raw: &mut BitReader<'_>,
) -> Result<(), CodecError> {
    let dense = class.kind == ClassKind::Dense;
    if dense && !map.is_step {
        return Err(bad("a dense class in an absolute patch"));
    }
    for (rank, &symbol) in symbols.iter().enumerate() {
        if !map.is_step {
            let low = raw.get(W::BITS - 8)?;
            own.values.push(join_word(symbol, low, map.order.is_float));
            continue;
        }
        if dense {
            if symbol == 0 {
                continue;
            }
            own.ranks.push(rank as u32);
        }
        let (least, width) = magnitude_of::<W>(symbol).ok_or(bad("a magnitude beyond the word"))?;
        let (sign, low) = if dense {
            let bits = raw.get(1 + width)?;
            (bits & 1, bits >> 1)
        } else {
            (u64::from(signs.next().unwrap_or_default()), raw.get(width)?)
        };
        own.values.push(step_of(sign, least + low));
    }
    Ok(())
}

//! Segments as decoders on another machine read them: head and records parsed and checked here, tables laid out
//! as plain 32-bit words that a device can hold. The layout belongs to the kernels that read it, is never
//! stored, and may change with them; the blob is not needed.
//!
//! Words of [`FlatTables`], offsets counted from its start, 0 for none:
//! - the first list lies at 1, and ten of 64 symbols each, of the gaps' quotients, follow one another; from
//!   652 on each of them has 4096 bytes, the symbol of every slot, which in these lists is also its entry;
//! - a **list** is the count of its entries and for each, in order of slots, symbol | (frequency - 1) << 8 | first
//!   slot << 20;
//! - **sparse**: number of live classes (in order of keys), rows' list | rows' low bits << 24, then three words a
//!   class: lowest key | highest key << 8 | kind << 16 | low bits << 24 (kind: 0 gaps, 1 dense, 2 clustered, 4
//!   flags), list of its gap symbols or frequency of a change, list of its value symbols;
//! - **dense**: number of classes, 64 words that hold the class of each key as a byte, the classes' lists;
//! - **planes**: a list for each byte plane.

use crate::classes::{ClassKind, KeyMap};
use crate::gap;
use crate::head::Head;
use crate::rans::SymbolTable;
use crate::record::{parse_records, segment_seed_term};
use crate::segment::{BaseKind, PatchKind, SegmentSpec};
use crate::{CodecError, QuantLayout, RECORD_BYTES};

/// Most live classes of mode S that are laid out; segments with more keep their sparse tables to themselves.
pub const FLAT_CLASSES: usize = 16;

/// Where the slots of the gaps' tables start: behind their ten lists, at a multiple of four words.
const GAP_SLOTS: usize = 652;

/// Tables of many segments.
#[derive(Debug, Clone)]
pub struct FlatTables {
    words: Vec<u32>,
}

/// What a device must know of a segment besides its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlatSegment {
    /// The spec it was parsed with.
    pub spec: SegmentSpec,
    /// Words of a chunk as a power of two; 0 without chunks.
    pub chunk_log2: u32,
    /// Number of chunks; 0 when no word differs from the base (or, without one, from zero).
    pub chunks: u32,
    /// Encoded bytes of the head.
    pub head_bytes: usize,
    /// Encoded bytes of the blob.
    pub blob_bytes: u32,
    /// What the head and the spec contribute to the sum of every payload's check.
    pub check_term: u64,
    /// Where the sparse tables lie; 0 if there are none or they have too many classes.
    pub sparse: u32,
    /// Where the dense tables lie.
    pub dense: u32,
    /// Where the planes' tables lie.
    pub planes: u32,
    /// Classes of the dense tables.
    pub dense_classes: u32,
    /// Planes that have a list.
    pub coded_planes: u32,
    /// Whether rows are context of the sparse tables.
    pub rows: bool,
    /// Whether the sparse tables are those of mode F.
    pub flags: bool,
    /// Entries of all their lists of values.
    pub flag_entries: u32,
    /// Where the exponent field of a base's word starts.
    pub key_shift: u32,
    /// The exponent field, shifted down; 0 where words have no key.
    pub key_mask: u32,
}

impl FlatSegment {
    /// A segment of which only the spec is known.
    pub fn unparsed(spec: SegmentSpec) -> Self {
        Self {
            spec,
            chunk_log2: 0,
            chunks: 0,
            head_bytes: 0,
            blob_bytes: 0,
            check_term: 0,
            sparse: 0,
            dense: 0,
            planes: 0,
            dense_classes: 0,
            coded_planes: 0,
            rows: false,
            flags: false,
            flag_entries: 0,
            key_shift: 0,
            key_mask: 0,
        }
    }

    /// Whether values are steps from a base.
    pub fn is_step(&self) -> bool {
        self.spec.kind == PatchKind::Relative && self.spec.base != BaseKind::None
    }

    /// 0 for words or no base, 1 for Q4_0, 2 for Q4_1, 3 for Q8_0.
    pub fn quant_code(&self) -> u32 {
        match self.spec.base {
            BaseKind::None | BaseKind::Words => 0,
            BaseKind::Quantized(QuantLayout::Q4_0) => 1,
            BaseKind::Quantized(QuantLayout::Q4_1) => 2,
            BaseKind::Quantized(QuantLayout::Q8_0) => 3,
        }
    }
}

impl Default for FlatTables {
    fn default() -> Self {
        FlatTables::new()
    }
}

impl FlatTables {
    /// The tables of gaps, which all segments share.
    pub fn new() -> Self {
        let mut tables = FlatTables { words: vec![0] };
        for rate in gap::RATE_MIN..16 {
            tables.list(gap::table(rate));
        }
        tables.words.resize(GAP_SLOTS, 0);
        for rate in gap::RATE_MIN..16 {
            let (fours, _) = gap::table(rate).slots().as_chunks::<4>();
            let symbols = fours.iter().map(|four| u32::from_le_bytes(four.map(|slot| slot as u8)));
            tables.words.extend(symbols);
        }
        tables
    }

    /// The words.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Parse one segment off the front of the two sections, as [`crate::SegmentView::take`] does, and append its
    /// tables.
    pub fn take(
        &mut self,
        spec: SegmentSpec,
        heads: &mut &[u8],
        index: &mut &[u8],
    ) -> Result<FlatSegment, CodecError> {
        let all = *heads;
        let head = Head::take(heads, &spec)?;
        let head_bytes = all.len() - heads.len();
        let chunks = head.chunk_count(spec.words);
        let records = parse_records(index, chunks)?;
        *index = &index[chunks * RECORD_BYTES..];
        let is_step = spec.kind == PatchKind::Relative && spec.base != BaseKind::None;
        let keys = KeyMap::new(spec.dtype, is_step);
        let mut flat = FlatSegment {
            spec,
            chunk_log2: head.chunk_log2,
            chunks: chunks as u32,
            head_bytes,
            blob_bytes: records.last().map_or(0, |record| record.end_bytes),
            check_term: segment_seed_term(&all[..head_bytes], &spec),
            key_shift: keys.shift,
            key_mask: keys.mask.into(),
            ..FlatSegment::unparsed(spec)
        };
        self.sparse(&head, &mut flat);
        if let Some(dense) = &head.dense {
            let lists: Vec<u32> = dense.classes.iter().map(|class| self.list(&class.values)).collect();
            flat.dense = self.words.len() as u32;
            flat.dense_classes = lists.len() as u32;
            self.words.push(flat.dense_classes);
            let (fours, _) = dense.class_of_key.as_chunks::<4>();
            self.words.extend(fours.iter().map(|&four| u32::from_le_bytes(four)));
            self.words.extend(lists);
        }
        if let Some(planes) = &head.planes {
            let lists: Vec<u32> =
                planes.iter().map(|table| table.as_ref().map_or(0, |table| self.list(table))).collect();
            flat.planes = self.words.len() as u32;
            flat.coded_planes = lists.iter().filter(|&&list| list != 0).count() as u32;
            self.words.extend(lists);
        }
        Ok(flat)
    }

    fn sparse(&mut self, head: &Head, flat: &mut FlatSegment) {
        let Some(tables) = &head.sparse else { return };
        let live: Vec<_> = tables.classes.iter().filter(|class| class.kind != ClassKind::Still).collect();
        let unusable = |kind| kind == ClassKind::Dense && !flat.is_step();
        if (live.len() > FLAT_CLASSES && !tables.flags) || live.iter().any(|class| unusable(class.kind)) {
            return;
        }
        let rows = tables.row_rate.map_or(0, |rate| gap_list(rate) | gap::low_bits(rate) << 24);
        let mut words = vec![live.len() as u32, rows];
        for class in live {
            let (kind, low_bits, gaps) = match (class.kind, &class.gaps) {
                (ClassKind::Gaps(rate), _) => (0, gap::low_bits(rate), gap_list(rate)),
                (ClassKind::Flags(frequency), _) => (4, 0, frequency),
                (_, Some(table)) => (2, 0, self.list(table)),
                _ => (1, 0, 0),
            };
            words.push(u32::from(class.low) | u32::from(class.high) << 8 | kind << 16 | low_bits << 24);
            words.push(gaps);
            words.push(class.values.as_ref().map_or(0, |table| self.list(table)));
        }
        flat.sparse = self.words.len() as u32;
        flat.rows = rows != 0;
        flat.flags = tables.flags;
        if flat.flags {
            let lists = words[2..].chunks_exact(3).map(|class| class[2]).filter(|&list| list != 0);
            flat.flag_entries = lists.map(|list| self.words[list as usize]).sum();
        }
        self.words.extend(words);
    }

    /// Append a list; where it lies.
    fn list(&mut self, table: &SymbolTable) -> u32 {
        let at = self.words.len();
        self.words.push(0);
        for (symbol, &(start, frequency)) in table.ranges.iter().enumerate().filter(|(_, range)| range.1 > 0)
        {
            self.words.push(symbol as u32 | (u32::from(frequency) - 1) << 8 | u32::from(start) << 20);
        }
        self.words[at] = (self.words.len() - at - 1) as u32;
        at as u32
    }
}

/// Where the list of a rate's quotients lies: ten tables of 64 symbols, all of which occur.
fn gap_list(rate: u32) -> u32 {
    let table = if rate < 16 { rate } else { 12 + rate % 4 };
    1 + (table - gap::RATE_MIN) * 65
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rate_finds_its_list() {
        let tables = FlatTables::new();
        for rate in gap::RATE_MIN..=gap::RATE_MAX {
            let at = gap_list(rate) as usize;
            assert_eq!(tables.words()[at], 64);
            for (symbol, &(start, frequency)) in gap::table(rate).ranges.iter().enumerate() {
                let entry = symbol as u32 | (u32::from(frequency) - 1) << 8 | u32::from(start) << 20;
                assert_eq!(tables.words()[at + 1 + symbol], entry);
            }
            let slots = &tables.words()[GAP_SLOTS + (at - 1) / 65 * 1024..][..1024];
            for (number, &slot) in gap::table(rate).slots().iter().enumerate() {
                assert_eq!(slots[number / 4].to_le_bytes()[number % 4], slot as u8);
            }
        }
    }
}

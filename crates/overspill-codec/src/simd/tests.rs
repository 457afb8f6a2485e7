//! Every function of this module against its portable twin, on random data.

use super::*;

#[test]
fn bytes_are_coded_as_the_reference_does() {
    println!("seed 5");
    let mut rng = fastrand::Rng::with_seed(5);
    let (mut spare, mut reference) = (Vec::new(), Vec::new());
    for round in 0..60 {
        let used = [1, 2, 3, 17, 200][round % 5];
        let mut frequencies = [1u16; 256];
        frequencies[used..].fill(0);
        frequencies[rng.usize(..used)] += 4096 - used as u16;
        let table = SymbolTable::new(&frequencies);
        let bytes: Vec<u8> = (0..rng.usize(..5000))
            .map(|_| table.slots()[rng.usize(..if round % 2 == 0 { 4096 } else { 200 })] as u8)
            .collect();
        let (states, first) = encode_bytes(&bytes, &table, &mut spare);
        let (expected_states, expected_first) = rans::encode_bytes(&bytes, &table, &mut reference);
        assert_eq!((states, &spare[first..]), (expected_states, &reference[expected_first..]));
        let mut coded = vec![];
        rans::put_coded(&states, spare[first..].iter(), &mut coded);
        let mut back = vec![0; bytes.len()];
        let mut decoder = Decoder::new(&coded, MAX_LANES).unwrap();
        for part in back.chunks_mut(32 * (1 + round)) {
            decode_next(&mut decoder, &table, part).unwrap();
        }
        decoder.finish().unwrap();
        assert_eq!(back, bytes);
        let mut decoder = Decoder::new(&coded, MAX_LANES).unwrap();
        back.fill(0);
        decoder.bytes(&table, &mut back).unwrap();
        assert_eq!(back, bytes);
    }
}

#[test]
fn block_operations_equal_the_reference() {
    println!("seed 6");
    let mut rng = fastrand::Rng::with_seed(6);
    for _ in 0..300 {
        let keys: Vec<u8> = (0..3000).map(|_| rng.u8(..)).collect();
        let words: Vec<u8> = keys.iter().flat_map(|&key| (u16::from(key) << 7).to_le_bytes()).collect();
        let mut new = words.clone();
        for _ in 0..rng.usize(..200) {
            new[rng.usize(..6000)] ^= 1 << rng.u8(..8);
        }
        let keys = KeyMap { shift: 7, mask: 0xff };
        let map = ValueMap { order: crate::words::OrderMap { is_float: true }, is_step: true };
        // Cuts near enough to be looked up at once, and cuts that are not; a class in between is left out.
        let (from, spread) = (rng.u8(..128), if rng.bool() { 62 } else { 127 });
        let mut cuts: Vec<u8> = (0..rng.usize(2..17)).map(|_| from + rng.u8(..spread)).collect();
        cuts.extend([254, 255]);
        cuts.sort_unstable();
        cuts.dedup();
        let lows = std::iter::once(0).chain(cuts.iter().map(|&high| high.wrapping_add(1)));
        let mut empty: Vec<_> = lows
            .zip(&cuts)
            .map(|(low, &high)| ClassEvents::<u16> { low, high, ..ClassEvents::default() })
            .collect();
        empty.remove(1);
        let ranges = [3..1000, 1000..1001, 1100..2999];
        let (mut fast, mut slow) = (empty.clone(), empty);
        let (mut changed, mut reference) = (vec![], vec![]);
        change_masks::<u16>(&words, &new, &mut changed);
        scan::change_masks::<u16, Portable>(&words, &new, &mut reference);
        assert_eq!(changed, reference);
        let values = scan::tests::values_in(&words, &new, &ranges, map);
        collect_events(&words, &changed, &values, &ranges, keys, &mut fast);
        scan::collect_events::<u16, Portable>(&words, &changed, &values, &ranges, keys, &mut slow);
        for (fast, slow) in fast.iter().zip(&slow) {
            assert_eq!((&fast.ranks, &fast.values), (&slow.ranks, &slow.values));
            assert_eq!(fast.population, slow.population);
        }
        let (mut a, mut b) = (words.clone(), words.clone());
        let fast_ok = apply_events(&mut a, &ranges, keys, map, &fast);
        let slow_ok = scan::apply_events::<u16, Portable>(&mut b, &ranges, keys, map, &slow);
        assert!(fast_ok && slow_ok && a == b);
    }
}

#[test]
fn symbols_of_many_tables_are_decoded_as_the_reference_does() {
    println!("seed 9");
    let mut rng = fastrand::Rng::with_seed(9);
    for round in 0..40 {
        let tables: Vec<SymbolTable> = (1..=rng.usize(1..9))
            .map(|used| {
                let mut frequencies = [0u16; 64];
                frequencies[..used].fill(1);
                frequencies[rng.usize(..used)] += 4096 - used as u16;
                SymbolTable::new(&frequencies)
            })
            .collect();
        let slots: Vec<u32> = tables.iter().flat_map(|table| table.slots().as_slice()).copied().collect();
        let classes: Vec<u8> = (0..rng.usize(..3000)).map(|_| rng.u8(..tables.len() as u8)).collect();
        let mut encoder = rans::Encoder::default();
        let mut symbols = Vec::new();
        for &class in &classes {
            let table = &tables[usize::from(class)];
            symbols.push(table.slots()[rng.usize(..4096)] as u8);
            encoder.push(table, symbols[symbols.len() - 1].into());
        }
        let mut coded = Vec::new();
        encoder.finish(&[rans::STATE_LOW; MAX_LANES], &mut coded);
        let mut decoder = Decoder::new(&coded, MAX_LANES).unwrap();
        let mut back = vec![0; classes.len()];
        for (back, classes) in back.chunks_mut(32 * (1 + round)).zip(classes.chunks(32 * (1 + round))) {
            decode_classed(&mut decoder, &slots, classes, back).unwrap();
        }
        decoder.finish().unwrap();
        assert_eq!(back, symbols);
    }
}

#[test]
fn runs_of_symbols_start_at_any_lane() {
    println!("seed 10");
    let mut rng = fastrand::Rng::with_seed(10);
    let table = SymbolTable::new(&[1, 4000, 90, 5]);
    for lanes in [1usize, 8, 32] {
        let symbols: Vec<u8> = (0..4000).map(|_| rng.u8(..4)).collect();
        let mut encoder = rans::Encoder::default();
        symbols.iter().for_each(|&symbol| encoder.push(&table, symbol.into()));
        let mut coded = Vec::new();
        encoder.finish(&vec![rans::STATE_LOW; lanes], &mut coded);
        let mut decoder = Decoder::new(&coded, lanes).unwrap();
        let mut back = vec![0; symbols.len()];
        let mut rest = back.as_mut_slice();
        while !rest.is_empty() {
            let (run, others) = rest.split_at_mut(rng.usize(1..300).min(rest.len()));
            decode_next(&mut decoder, &table, run).unwrap();
            rest = others;
        }
        decoder.finish().unwrap();
        assert_eq!(back, symbols);
    }
}

#[test]
fn sums_planes_and_counts_equal_the_reference() {
    println!("seed 12");
    let mut rng = fastrand::Rng::with_seed(12);
    for _ in 0..50 {
        let words: Vec<u8> = (0..4 * rng.usize(..700)).map(|_| rng.u8(..)).collect();
        let odd = &words[..words.len() - rng.usize(..4).min(words.len())];
        assert_eq!(keyed_sum(odd), record::keyed_sum(odd));
        for shift in [0, 8, 16, 24] {
            let (mut fast, mut slow) = (vec![0; words.len() / 4], vec![0; words.len() / 4]);
            split_plane::<u32>(&words, true, shift, &mut fast);
            planes::split_plane::<u32>(&words, true, shift, &mut slow);
            assert_eq!(fast, slow);
        }
        assert_eq!(count_nonzero::<u16>(&words), scan::count_nonzero::<u16>(&words));
        let keys = KeyMap { shift: 7, mask: 0xff };
        let mut tables = [[[0; 256]; 8]; 2];
        count_keys::<u16>(&words, keys, 2, &mut tables[0]);
        scan::count_keys::<u16>(&words, keys, 2, &mut tables[1]);
        assert_eq!(tables[0], tables[1]);
    }
}

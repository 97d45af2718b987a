//! Checks on the real weights. `scripts/test` fetches them and runs these; without them they are
//! ignored, not passed. They share the machine and its memory count: `--test-threads 1`.
//! `MLX_FLASH_DEVICE=cuda` runs them on a GPU.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::fs::File;
use std::io::BufReader;

use anyhow::Result;
use candle_core::quantized::gguf_file::Content;
use candle_core::{Device, Tensor};
use clap::Parser;

use crate::attention::{Attention, keys_seen};
use crate::common::tested;
use crate::model::{Model, Weights};
use crate::{Cli, LONG_TEXT, Run, measured, reference, tokenizer};

/// The weights' file, and the first `count` tokens of the long text.
struct World {
    content: Content,
    text: Vec<u32>,
}

impl World {
    fn open() -> Result<(Self, BufReader<File>)> {
        let models = std::env::var_os("MLX_FLASH_MODELS").map(std::path::PathBuf::from);
        let name = "gemma-3-270m-q4_k_m.gguf";
        let path = crate::common::file(models.as_deref(), "gemma3-270m", name)?;
        let mut reader = BufReader::new(File::open(path)?);
        let content = Content::read(&mut reader)?;
        let text = tokenizer::encode(&tokenizer::from_gguf(&content)?, LONG_TEXT)?;
        Ok((Self { content, text }, reader))
    }

    fn weights(&self, reader: BufReader<File>, dequantize: bool) -> Weights<'_, BufReader<File>> {
        Weights {
            content: &self.content,
            reader,
            device: tested(),
            dequantize,
        }
    }

    fn tokens(&self, count: usize) -> Vec<u32> {
        self.text.iter().copied().cycle().take(count).collect()
    }
}

/// The relative error of logits.
fn error(got: &[f32], want: &[f32]) -> f32 {
    let off = got.iter().zip(want).map(|(a, b)| f64::from(a - b).powi(2));
    let all = want.iter().map(|b| f64::from(*b).powi(2));
    (off.sum::<f64>() / all.sum::<f64>()).sqrt() as f32
}

/// The token of the largest logit, and by how much it leads.
fn best(logits: &[f32]) -> (u32, f32) {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.select_nth_unstable_by(1, |a, b| logits[*b].total_cmp(&logits[*a]));
    (order[0] as u32, logits[order[0]] - logits[order[1]])
}

/// The relative error of each position's logits, and how many positions whose best token leads by
/// more than 1e-3 have another best one.
fn compared(model: &Model, got: &Tensor, want: &Tensor) -> Result<(Vec<f32>, usize)> {
    let positions = want.dim(1)?;
    let (mut errors, mut other) = (Vec::new(), 0);
    for at in (0..positions).step_by(60) {
        let rows = (positions - at).min(60);
        let logits = |x: &Tensor| -> Result<Vec<Vec<f32>>> {
            Ok(model
                .logits(&x.narrow(1, at, rows)?)?
                .squeeze(0)?
                .to_vec2()?)
        };
        for (got, want) in logits(got)?.iter().zip(&logits(want)?) {
            errors.push(error(got, want));
            let ((got, _), (want, lead)) = (best(got), best(want));
            other += usize::from(lead > 1e-3 && got != want);
        }
    }
    Ok((errors, other))
}

fn largest(errors: &[f32]) -> f32 {
    errors.iter().copied().fold(0.0, f32::max)
}

#[test]
fn a_token_sees_exactly_the_window() {
    for (window, rows) in [(512, 600), (512, 513), (512, 512), (7, 30)] {
        let seen = |whose| keys_seen(whose, rows, window, &tested()).unwrap();
        assert_eq!(seen(Attention::Ours), window);
        // What candle's model does: one more, where there is one.
        assert_eq!(seen(Attention::Candle), rows.min(window + 1));
    }
}

/// Pieces whose scores rank otherwise than their ids, their lengths or their places in a text.
#[test]
fn pieces_join_by_score() {
    let pieces = [
        ("<unk>", 0.0, 2),
        ("<bos>", 0.0, 3),
        ("a", -9.0, 1),
        ("b", -9.0, 1),
        ("c", -9.0, 1),
        ("d", -9.0, 1),
        ("ab", -4.0, 1),
        ("abc", -5.0, 1),
        ("bcd", -6.0, 1),
        ("cd", -2.0, 1),
        ("bc", -1.0, 1),
        ("da", -3.0, 1),
        ("<x>", 0.0, 4),
        ("x", -9.0, 1),
    ];
    let names = pieces.map(|(name, ..)| name);
    let scores = pieces.map(|(_, score, _)| score);
    let types = pieces.map(|(.., kind)| kind);
    let tokenizer = tokenizer::from_pieces(&names, &scores, &types).unwrap();
    for (text, want) in [
        // The best pair first, wherever it is and whatever it leaves of others.
        ("bcd", &["bcd"][..]),
        ("abc", &["abc"]),
        ("abcd", &["abc", "d"]),
        ("abdab", &["ab", "da", "b"]),
        ("acda", &["a", "cd", "a"]),
        ("dabcd", &["da", "bcd"]),
        ("cdabab", &["cd", "ab", "ab"]),
        // A piece that stands for itself neither joins nor is joined.
        ("ab<x>c", &["ab", "<x>", "c"]),
        ("xdax", &["x", "da", "x"]),
    ] {
        let ids = tokenizer::encode(&tokenizer, text).unwrap();
        let got: Vec<&str> = ids.iter().map(|id| names[*id as usize]).collect();
        assert_eq!(got[0], "<bos>");
        assert_eq!(got[1..], *want, "{text}");
    }
}

/// The ids are those of SentencePiece itself (0.2.3, from PyPI), over a BPE model in its own format made of
/// the file's pieces, scores and types: without a prefix, spaces kept.
#[test]
#[ignore = "needs the weights: scripts/fetch-models gemma3-270m"]
fn the_tokenizer_is_gemmas() {
    let (world, _) = World::open().unwrap();
    let tokenizer = tokenizer::from_gguf(&world.content).unwrap();
    let ids = |text: &str| tokenizer::encode(&tokenizer, text).unwrap();
    for (text, want) in [
        ("The capital of France is", &[818, 5279, 529, 7001, 563][..]),
        // Words that are no piece, so that the order of merges shows.
        (
            "pneumonoultramicroscopic",
            &[214016, 498, 194300, 1043, 2784, 60172],
        ),
        (
            "floccinaucinihilipilification",
            &[1674, 629, 7047, 20683, 2818, 47425, 760, 543, 2540],
        ),
        ("whichever antithesis", &[1914, 160221, 70518, 11730]),
        ("inthemiddle", &[720, 12427, 3712]),
        ("hahahahaha", &[89009, 957, 118653]),
        ("unhappinesses", &[602, 130739, 507]),
        ("na\u{ef}vet\u{e9}", &[1789, 238527, 8959, 236859]),
        (
            "\u{442}\u{438}\u{43f}\u{43e}\u{433}\u{440}\u{430}\u{444}\u{456}\u{44f}",
            &[1620, 2421, 168632],
        ),
        (
            "if(x!=y){return;}",
            &[584, 236769, 236781, 20181, 236762, 2526, 2060, 29007],
        ),
        // Pieces that stand for themselves.
        ("a  b   c", &[236746, 138, 236763, 139, 236755]),
        // A character that is no piece, byte by byte.
        ("x\u{e0101}y", &[236781, 481, 398, 370, 367, 236762]),
        // Both halvings of a piece score alike.
        ("aaaaaaaaaaaaaaa", &[128820, 50354, 72004]),
    ] {
        let got = ids(text);
        assert_eq!((got[0], &got[1..]), (2, want), "{text}");
    }
    let text = "Two  spaces,\n\nnew lines, \u{e9}t\u{e9}, \u{1f980} and <b>tags</b>.";
    assert_eq!(tokenizer.decode(&ids(text), true).unwrap(), text);
}

/// Tokens of a prompt that the windows of 512 do not hold.
const PAST_THE_WINDOW: usize = 700;

#[test]
#[ignore = "needs the weights: scripts/fetch-models gemma3-270m"]
fn logits_are_the_references_in_one_piece_and_in_chunks() {
    let (world, reader) = World::open().unwrap();
    let mut weights = world.weights(reader, true);
    let tokens = world.tokens(PAST_THE_WINDOW);
    let device = std::mem::replace(&mut weights.device, Device::Cpu);
    let want = reference::hidden(&mut weights, &tokens).unwrap();
    let want = want.to_device(&device).unwrap();
    weights.device = device;
    let mut model = Model::new(&mut weights, Attention::Ours, tokens.len()).unwrap();
    for chunk in [PAST_THE_WINDOW, 100] {
        model.reset();
        let parts = tokens
            .chunks(chunk)
            .map(|chunk| model.forward(chunk).unwrap());
        let got = Tensor::cat(&parts.collect::<Vec<_>>(), 1).unwrap();
        let (errors, other) = compared(&model, &got, &want).unwrap();
        println!(
            "chunks of {chunk}: relative error {:.2e}, {other} other best tokens",
            largest(&errors)
        );
        assert!(
            largest(&errors) < 1e-2,
            "chunks of {chunk}: {}",
            largest(&errors)
        );
        assert_eq!(other, 0, "chunks of {chunk}");
    }
    // The check tells a window that is one key too long.
    model.reset();
    model.attention = Attention::Candle;
    let got = model.forward(&tokens).unwrap();
    let (errors, _) = compared(&model, &got, &want).unwrap();
    let (within, past) = errors.split_at(512);
    println!(
        "candle's mask: {:.2e} up to 512 tokens, {:.2e} after",
        largest(within),
        largest(past)
    );
    assert!(largest(within) < 1e-2 && largest(past) > 1e-2);
}

fn runs<const N: usize>(
    world: &World,
    weights: &mut Weights<'_, BufReader<File>>,
    (prompt, generate): (usize, usize),
    order: [Attention; N],
) -> [Run; N] {
    let generate = generate.to_string();
    let cli = Cli::parse_from(["gemma3", "--json", "--generate", &generate]);
    let tokens = world.tokens(prompt);
    let mut model = Model::new(weights, Attention::Ours, prompt + cli.generate).unwrap();
    order.map(|whose| measured(&cli, &mut model, whose, &tokens, |_| Ok(())).unwrap())
}

/// Logits of 40 steps: after the prompt, then after each token of a text, or of the model's own.
fn said(
    model: &mut Model,
    whose: Attention,
    prompt: &[u32],
    text: Option<&[u32]>,
) -> Vec<Vec<f32>> {
    model.reset();
    model.attention = whose;
    let mut piece = prompt.to_vec();
    let step = |step: usize| {
        let hidden = model.forward(&piece).unwrap();
        let last = hidden.narrow(1, piece.len() - 1, 1).unwrap();
        let logits = model.logits(&last).unwrap().flatten_all().unwrap();
        let logits = logits.to_vec1().unwrap();
        piece = vec![text.map_or_else(|| best(&logits).0, |text| text[step])];
        logits
    };
    (0..40).map(step).collect()
}

/// Products with quantized weights round what they multiply to 8 bits, so that the least difference in
/// attention grows to that of such roundings, on every device. Where it is more than the best token leads
/// by, texts part, which they do not from this prompt: `--nocapture` shows each step.
#[test]
#[ignore = "needs the weights: scripts/fetch-models gemma3-270m"]
fn forty_tokens_are_the_same_as_with_candles_attention() {
    let (world, reader) = World::open().unwrap();
    let mut weights = world.weights(reader, true);
    // Up to the edge of the window candle's mask is right.
    let prompt = world.tokens(470);
    for dequantize in [true, false] {
        weights.dequantize = dequantize;
        let kind = if dequantize { "f32" } else { "quantized" };
        let mut model = Model::new(&mut weights, Attention::Candle, prompt.len() + 40).unwrap();
        // candle's text through each attention.
        let want = said(&mut model, Attention::Candle, &prompt, None);
        let text: Vec<u32> = want.iter().map(|logits| best(logits).0).collect();
        let mut other = |whose| said(&mut model, whose, &prompt, Some(&text));
        let (ours, nudged) = (other(Attention::Ours), other(Attention::Nudged));
        let mut same = [40, 40];
        let mut most = [0.0_f32; 2];
        for (step, want) in want.iter().enumerate() {
            let (token, lead) = best(want);
            print!("{kind} {step:2}: token {token} leads by {lead:.4}");
            for (n, (name, got)) in [("ours", &ours), ("nudged", &nudged)].iter().enumerate() {
                let (error, best) = (error(&got[step], want), best(&got[step]).0);
                most[n] = most[n].max(error);
                print!("; {name} {error:.1e} off");
                if best != token {
                    print!(", takes {best}");
                    same[n] = same[n].min(step);
                }
            }
            println!();
        }
        let ([same, same_nudged], [most, most_nudged]) = (same, most);
        println!(
            "{kind} weights: the first {same} of 40 tokens are the same, logits at most {most:.1e} off; \
             with candle's attention nudged by a rounding {same_nudged} and {most_nudged:.1e}"
        );
        assert_eq!(same, 40);
        if dequantize {
            assert!(most < 1e-4, "{most}");
        } else {
            assert!(most < 4.0 * most_nudged, "{most}, nudged {most_nudged}");
        }
    }
}

#[test]
#[ignore = "needs the weights: scripts/fetch-models gemma3-270m"]
fn sixty_tokens_are_the_same_as_on_the_cpu() {
    let (world, reader) = World::open().unwrap();
    // In f32: products with quantized weights round their operands in other ways on other devices.
    let mut weights = world.weights(reader, true);
    if weights.device.is_cpu() {
        println!("SKIPPED: MLX_FLASH_DEVICE names no other device");
        return;
    }
    // Past the window.
    let [there] = runs(&world, &mut weights, (700, 60), [Attention::Ours]);
    weights.device = Device::Cpu;
    let [here] = runs(&world, &mut weights, (700, 60), [Attention::Ours]);
    println!("GPU: {:?}\nCPU: {:?}", there.generated, here.generated);
    assert_eq!(there.generated, here.generated);
}

#[test]
#[ignore = "needs the weights: scripts/fetch-models gemma3-270m"]
fn a_long_prompt_takes_less_time_and_memory() {
    let (world, reader) = World::open().unwrap();
    let mut weights = world.weights(reader, true);
    let [short] = runs(&world, &mut weights, (2048, 1), [Attention::Ours]);
    let both = [Attention::Candle, Attention::Ours];
    let [candle, ours] = runs(&world, &mut weights, (4096, 1), both);
    let seconds = |run: &Run| run.clock.attention.as_secs_f64();
    println!(
        "4,096 tokens, attention: candle {:.2} s (masks {:.2} s), ours {:.2} s; \
         peak: candle {} MB, ours {} MB (2,048 tokens: {} MB)",
        seconds(&candle),
        candle.clock.masks.as_secs_f64(),
        seconds(&ours),
        candle.peak >> 20,
        ours.peak >> 20,
        short.peak >> 20
    );
    if !weights.device.is_cpu() {
        let peaks = [&short, &ours, &candle].map(|run| run.gpu_peak.map(|bytes| bytes as f64));
        let [Some(short), Some(ours), Some(candle)] = peaks else {
            println!("SKIPPED: this device does not tell its memory");
            return;
        };
        println!(
            "on the GPU: candle {:.0} MB, ours {:.0} MB (2,048 tokens: {:.0} MB)",
            candle / 1e6,
            ours / 1e6,
            short / 1e6
        );
        // Twice the tokens, not four times; drivers hand memory out in large pieces. Times are the CPU's.
        assert!(ours < candle);
        assert!(ours < 3.0 * short, "memory grows with the square");
        return;
    }
    // Without its masks too.
    assert!(seconds(&candle) - candle.clock.masks.as_secs_f64() > 3.0 * seconds(&ours));
    assert!(ours.peak < candle.peak);
    assert!(
        ours.peak as f64 / (short.peak as f64) < 2.2,
        "memory grows with more than the tokens"
    );
}

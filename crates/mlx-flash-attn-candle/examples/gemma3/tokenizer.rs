//! The tokenizer that a Gemma GGUF carries: SentencePiece's pieces with their scores.

use std::collections::HashMap;

use anyhow::{Context, Result, anyhow};
use candle_core::quantized::gguf_file::{Content, Value};
use tokenizers::decoders::{byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence};
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::Replace;
use tokenizers::{AddedToken, Tokenizer};

/// How SentencePiece writes a space.
const SPACE: &str = "\u{2581}";
/// `token_type` of pieces that stand for themselves, before any merge.
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

fn list<'a>(content: &'a Content, key: &str) -> Result<&'a Vec<Value>> {
    let value = content.metadata.get(key);
    Ok(value
        .with_context(|| format!("the file has no {key}"))?
        .to_vec()?)
}

/// Two pieces that join to a piece join by its score, best first: so ranks of merges are what a
/// byte-pair encoder wants, and every way to halve a piece is one.
fn merges(pieces: &[&str], scores: &[f32], ids: &HashMap<&str, u32>) -> Vec<(String, String)> {
    let mut ways: Vec<(f32, u32, u32, u32)> = Vec::new();
    for (id, (piece, score)) in (0_u32..).zip(pieces.iter().zip(scores)) {
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if let (Some(left), Some(right)) = (ids.get(left), ids.get(right)) {
                ways.push((*score, id, *left, *right));
            }
        }
    }
    ways.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let piece = |id: u32| pieces[id as usize].to_owned();
    ways.into_iter()
        .map(|(_, _, left, right)| (piece(left), piece(right)))
        .collect()
}

/// The tokenizer of a GGUF whose `tokenizer.ggml.model` is `llama`.
pub(crate) fn from_gguf(content: &Content) -> Result<Tokenizer> {
    let tokens = list(content, "tokenizer.ggml.tokens")?;
    let pieces: Vec<&str> = tokens
        .iter()
        .map(|t| Ok(t.to_string()?.as_str()))
        .collect::<Result<_>>()?;
    let scores: Vec<f32> = list(content, "tokenizer.ggml.scores")?
        .iter()
        .map(|s| Ok(s.to_f32()?))
        .collect::<Result<_>>()?;
    let types: Vec<i32> = list(content, "tokenizer.ggml.token_type")?
        .iter()
        .map(|t| Ok(t.to_i32()?))
        .collect::<Result<_>>()?;
    from_pieces(&pieces, &scores, &types)
}

/// The tokenizer of pieces, which stand where their ids say.
pub(crate) fn from_pieces(pieces: &[&str], scores: &[f32], types: &[i32]) -> Result<Tokenizer> {
    // Whole-piece tokens take no part in merges.
    let whole = |id: usize| matches!(types.get(id), Some(&CONTROL | &USER_DEFINED));
    let ids: HashMap<&str, u32> = (0_u32..)
        .zip(pieces)
        .filter(|(id, _)| !whole(*id as usize))
        .map(|(id, piece)| (*piece, id))
        .collect();
    let mergeable: Vec<&str> = pieces
        .iter()
        .enumerate()
        .map(|(id, piece)| if whole(id) { "" } else { piece })
        .collect();
    let merges = merges(&mergeable, scores, &ids);
    let vocab = (0_u32..)
        .zip(pieces)
        .map(|(id, piece)| ((*piece).to_owned(), id));
    let model = BPE::builder()
        .vocab_and_merges(vocab.collect::<tokenizers::models::bpe::Vocab>(), merges)
        .unk_token("<unk>".into())
        .fuse_unk(true)
        .byte_fallback(true)
        .build()
        .map_err(|e| anyhow!(e))?;
    let mut tokenizer = Tokenizer::new(model);
    let replace = |from: &str, to: &str| Replace::new(from, to).map_err(|e| anyhow!(e));
    tokenizer
        .with_normalizer(Some(replace(" ", SPACE)?))
        .map_err(|e| anyhow!(e))?;
    tokenizer.with_decoder(Some(Sequence::new(vec![
        replace(SPACE, " ")?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ])));
    let added = |kind: i32, special: bool| -> Vec<AddedToken> {
        let of_kind = pieces.iter().zip(types).filter(|(_, t)| **t == kind);
        of_kind
            .map(|(piece, _)| AddedToken::from(*piece, special).normalized(false))
            .collect()
    };
    tokenizer
        .add_special_tokens(added(CONTROL, true))
        .map_err(|e| anyhow!(e))?;
    tokenizer
        .add_tokens(added(USER_DEFINED, false))
        .map_err(|e| anyhow!(e))?;
    Ok(tokenizer)
}

/// Token ids of a text, after the token that begins one.
pub(crate) fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let begin = tokenizer
        .token_to_id("<bos>")
        .context("there is no <bos>")?;
    let encoding = tokenizer.encode(text, false).map_err(|e| anyhow!(e))?;
    Ok(std::iter::once(begin)
        .chain(encoding.get_ids().iter().copied())
        .collect())
}

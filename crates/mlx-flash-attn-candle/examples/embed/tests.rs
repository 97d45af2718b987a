//! Checks on the real weights, ignored without them. `scripts/check-embed` compares the embeddings
//! themselves with float64.
#![allow(clippy::unwrap_used)]

use candle_core::Device;

use crate::model::Model;
use crate::{SENTENCES, encode, tokenizer};

fn file(name: &str) -> std::path::PathBuf {
    let models = std::env::var_os("MLX_FLASH_MODELS").map(std::path::PathBuf::from);
    crate::common::file(models.as_deref(), "all-mpnet-base-v2", name).unwrap()
}

#[test]
#[ignore = "needs the weights: scripts/fetch-models all-mpnet-base-v2"]
fn a_padded_batch_is_its_sentences_one_by_one() {
    let tokenizer = tokenizer(&file("tokenizer.json")).unwrap();
    let model = Model::load(
        &file("config.json"),
        &file("model.safetensors"),
        &Device::Cpu,
    )
    .unwrap();
    let texts = encode(&tokenizer, &SENTENCES.map(str::to_owned)).unwrap();
    let lens: Vec<usize> = texts.iter().map(Vec::len).collect();
    assert!(
        lens.iter().any(|len| len < lens.iter().max().unwrap()),
        "nothing is padded"
    );
    let together: Vec<Vec<f32>> = model.embed(&texts).unwrap().to_vec2().unwrap();
    for (text, together) in texts.into_iter().zip(together) {
        let alone: Vec<Vec<f32>> = model.embed(&[text]).unwrap().to_vec2().unwrap();
        let most = alone[0].iter().zip(&together).map(|(a, b)| (a - b).abs());
        let most = most.fold(0.0, f32::max);
        // Cells are about 1/28; f32 products of other shapes sum in another order.
        assert!(most < 1e-6, "{most}");
    }
}

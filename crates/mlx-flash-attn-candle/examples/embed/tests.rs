//! Checks on the real weights, ignored without them. `scripts/check-embed` compares the embeddings
//! themselves with float64. `MLX_FLASH_DEVICE=cuda` runs these on a GPU.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use candle_core::Device;

use crate::common::tested;
use crate::model::Model;
use crate::{SENTENCES, encode, tokenizer};

fn file(name: &str) -> std::path::PathBuf {
    let models = std::env::var_os("MLX_FLASH_MODELS").map(std::path::PathBuf::from);
    crate::common::file(models.as_deref(), "all-mpnet-base-v2", name).unwrap()
}

fn model(device: &Device) -> Model {
    Model::load(&file("config.json"), &file("model.safetensors"), device).unwrap()
}

fn texts() -> Vec<Vec<u32>> {
    let tokenizer = tokenizer(&file("tokenizer.json")).unwrap();
    encode(&tokenizer, &SENTENCES.map(str::to_owned)).unwrap()
}

fn embedded(model: &Model, texts: &[Vec<u32>]) -> Vec<Vec<f32>> {
    model.embed(texts).unwrap().to_vec2().unwrap()
}

/// The largest difference of two cells.
fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let each = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    each.fold(0.0, f32::max)
}

#[test]
#[ignore = "needs the weights: scripts/fetch-models all-mpnet-base-v2"]
fn a_padded_batch_is_its_sentences_one_by_one() {
    let device = tested();
    let model = model(&device);
    let texts = texts();
    let lens: Vec<usize> = texts.iter().map(Vec::len).collect();
    assert!(
        lens.iter().any(|len| len < lens.iter().max().unwrap()),
        "nothing is padded"
    );
    let together = embedded(&model, &texts);
    // Cells are about 1/28; f32 products of other shapes sum in another order.
    let least = if device.is_cpu() { 1e-6 } else { 1e-5 };
    for (text, together) in texts.into_iter().zip(together) {
        let alone = embedded(&model, &[text]);
        let most = apart(&alone[0], &together);
        println!("batched and alone: {most:.1e} apart");
        assert!(most < least, "{most}");
    }
}

#[test]
#[ignore = "needs the weights: scripts/fetch-models all-mpnet-base-v2"]
fn embeddings_are_those_on_the_cpu() {
    let device = tested();
    if device.is_cpu() {
        println!("SKIPPED: MLX_FLASH_DEVICE names no other device");
        return;
    }
    let texts = texts();
    let want = embedded(&model(&Device::Cpu), &texts);
    for (got, want) in embedded(&model(&device), &texts).iter().zip(&want) {
        let cosine: f32 = got.iter().zip(want).map(|(a, b)| a * b).sum();
        let most = apart(got, want);
        println!("GPU and CPU: {most:.1e} apart, cosine {cosine:.7}");
        assert!(most < 1e-5, "{most}");
    }
}

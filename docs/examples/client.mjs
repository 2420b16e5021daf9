// Embeds images in node: node client.mjs MODEL.onnx OUT.csv IMAGE...
// MODEL.onnx is one of `pmm export onnx`; MODEL.onnx.json must lie beside it.
import { readFile, writeFile } from 'node:fs/promises';
import ort from 'onnxruntime-node';
import sharp from 'sharp';

// Pillow's bilinear along the rows, to the bit; sharp has none that is equal. An image is {data, width, height}, its
// data RGB bytes.
function resizeWidth({ data, width: before, height }, width) {
  const scale = before / width;
  const support = Math.max(scale, 1);
  const out = new Uint8Array(height * width * 3);
  for (let x = 0; x < width; x++) {
    const centre = (x + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const last = Math.min(before, Math.trunc(centre + support + 0.5));
    const weights = [];
    for (let i = first; i < last; i++) weights.push(Math.max(0, 1 - Math.abs((i - centre + 0.5) * (1 / support))));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    const integers = weights.map((weight) => Math.trunc((weight / total) * 2 ** 22 + 0.5));
    for (let y = 0; y < height; y++)
      for (let c = 0; c < 3; c++) {
        let sum = 2 ** 21;
        for (let i = first; i < last; i++) sum += data[(y * before + i) * 3 + c] * integers[i - first];
        out[(y * width + x) * 3 + c] = Math.min(255, Math.floor(sum / 2 ** 22));
      }
  }
  return { data: out, width, height };
}

function transpose({ data, width, height }) {
  const out = new Uint8Array(data.length);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      for (let c = 0; c < 3; c++) out[(x * height + y) * 3 + c] = data[(y * width + x) * 3 + c];
  return { data: out, width: height, height: width };
}

async function readCrop(path, { width, height }) {
  const { data, info } = await sharp(path).rotate() // as its EXIF data says
    .toColourspace('srgb').removeAlpha().raw().toBuffer({ resolveWithObject: true });
  const narrow = resizeWidth({ data, width: info.width, height: info.height }, width);
  return transpose(resizeWidth(transpose(narrow), height)).data;
}

// What the file takes: bytes or floats, normalised by it or here, pixels or planes of colour last.
function tensorOf(crops, { dtype, layout, colour, normalised_by }, { width, height, mean, std }) {
  const [n, area] = [crops.length, height * width];
  const values = new (dtype === 'uint8' ? Uint8Array : Float32Array)(n * area * 3);
  crops.forEach((crop, row) => {
    for (let c = 0; c < 3; c++) {
      const channel = colour === 'bgr' ? 2 - c : c;
      for (let i = 0; i < area; i++) {
        const pixel = crop[i * 3 + c];
        const at = layout === 'NCHW' ? (row * 3 + channel) * area + i : (row * area + i) * 3 + channel;
        values[at] = normalised_by === 'caller' ? (pixel / 255 - mean[c]) / std[c] : pixel;
      }
    }
  });
  return new ort.Tensor(dtype, values, layout === 'NCHW' ? [n, 3, height, width] : [n, height, width, 3]);
}

const [model, out, ...paths] = process.argv.slice(2);
const { input, embedding, preprocessing } = JSON.parse(await readFile(`${model}.json`, 'utf8'));
if (preprocessing.interpolation !== 'bilinear' || !preprocessing.antialias || preprocessing.padding)
  throw new Error("this example resizes by Pillow's bilinear alone, without padding");
const crops = await Promise.all(paths.map((path) => readCrop(path, preprocessing)));
const session = await ort.InferenceSession.create(model);
const { [embedding.name]: found } = await session.run({ [input.name]: tensorOf(crops, input, preprocessing) });
const rows = crops.map((_, row) => found.data.slice(row * embedding.dim, (row + 1) * embedding.dim).join(','));
await writeFile(out, rows.join('\n') + '\n');

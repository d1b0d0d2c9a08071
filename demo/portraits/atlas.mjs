// Draws the atlas of the portraits: the layers of "Personas" by Draftbit (CC BY 4.0, https://personas.draftbit.com/),
// changed as noted below, one by one. Only whoever changes the pictures needs this script, and Node:
//
//   npm install @dicebear/core@9.4.3 @dicebear/personas@9.4.3 @resvg/resvg-js@2.6.2
//   node atlas.mjs        writes atlas.json and atlas.bin
//   xz -9e atlas.bin      atlas.bin.xz is kept as atlas.xz
//
// A colour in a layer is fixed, or belongs to a role: skin, hair or cloth, their glow (what an overlay of white makes of them) or
// their shade (of black). Each layer is drawn with every role black, then with one role white at a time: what a pixel gains is the
// role's share of it. So a layer is linear in the colours of its roles, and pictures are put together without this script.
//
// Changes to the art: larger glasses and mouths, mouths in front of beards, an opening for the mouth in the full beard, a thicker
// goatee, hair in front of clothes and below caps, another colour of the cap. Drawn anew: eyes without glasses, the grin, the
// bun, the mohawk, the beanie, stripes, jacket, collar and dress.
import { Resvg } from '@resvg/resvg-js';
import crypto from 'crypto';
import fs from 'fs';

const LIB = 'node_modules/@dicebear/personas/lib/';
const ROLES = ['skin', 'skin glow', 'skin shade', 'hair', 'hair glow', 'hair shade', 'cloth', 'cloth glow', 'cloth shade'];
const SIZE = 64, PHASES = 4;

const art = {};
for (const name of ['hair', 'eyes', 'mouth', 'nose', 'facialHair', 'body']) {
  art[name] = (await import(`./${LIB}components/${name}.js`))[name];
}
const personas = fs.readFileSync(LIB + 'index.js', 'utf8');
const head = personas.match(/body: `([\s\S]*?)<g transform="translate\(20 24\)">/)[1].replaceAll(/\$\{.*?\}`\)\}/g, '{skin}');

const part = (group, name) => art[group][name]({}, { skin: '{skin}', hair: '{hair}', clothing: '{cloth}' });
const put = (x, y, svg, scale = 1) => `<g transform="translate(${x} ${y}) scale(${scale})">${svg}</g>`;
// Overlays of white and black become the role's glow and shade, at the overlay's opacity.
const blend = (svg, role) => svg.replaceAll(/<path[^>]*mix-blend-mode[^>]*>/g, (path) => {
  const plain = path.replace(/ style="mix-blend-mode:\w+"/, '');
  if (!role || !path.includes('overlay')) return plain;
  return plain.replace('fill="#fff"', `fill="{${role} glow}"`).replace('fill="#000"', `fill="{${role} shade}"`);
});

const hair = (name) => put(2, 2, blend(part('hair', name), 'hair'));
const beard = (name, rise = 0) => put(14, 26 - rise, blend(part('facialHair', name), 'hair'));
// Scaled about the middle of the drawing, which stays in its place.
const eyes = (name, scale = 1.12) => put(32 - 12 * scale, 28.6 - 4.6 * scale, part('eyes', name), scale);
const mouth = (name, scale = 1.3) => put(32 - 9 * scale, 42.4 - 5 * scale, part('mouth', name), scale);
const path = (d, fill, opacity = 1) => `<path d="${d}" fill="${fill}" opacity="${opacity}"/>`;
const arc = (x, y) => `<path d="M${x - 3} ${y}q3 2.6 6 0" stroke="${DARK}" stroke-width="1.9" stroke-linecap="round"/>`;
const dot = (x, y) => `<circle cx="${x}" cy="${y}" r="2.1" fill="${DARK}"/>`;

const DARK = '#1B0640';
const TORSO = 'M16 5v3a5 5 0 0 0 10 0V5l6.65 2.05a9 9 0 0 1 6.35 8.6V20H3v-4.35a9 9 0 0 1 6.35-8.6L16 5Z';
const torso = (fill, over) => put(11, 44, `<clipPath id="torso">${path(TORSO, '#fff')}</clipPath>${path(TORSO, fill)}<g clip-path="url(#torso)">${over}</g>`);
const clothes = (name) => put(11, 44, blend(part('body', name), 'cloth'));
const opening = '<ellipse cx="32" cy="42.4" rx="7" ry="3.7" fill="{skin}"/><ellipse cx="32" cy="42.4" rx="7" ry="3.7" fill="{skin glow}" opacity=".36"/>';
// The fringe of the long hair without its lengths: hair that is tied up.
const FRINGE = 'M40.03 18.53A18.47 18.47 0 0 0 44 26v.03c.73.08 1.42.34 2 .73V25.5C46 16.39 38.84 9 30 9s-16 7.39-16 16.5v1.26c.58-.4 1.27-.65 2-.73V25c0-1.88.37-3.68 1.05-5.32 4.13 2.5 9.12 3.43 14.95 2.82 3.48-.37 6.16-1.7 8.03-3.97Z';
const CREST = 'M24.5 21 22 11l3.6 2.4-.8-7.2 4 4L30 2.5l1.2 7.7 4-4-.8 7.2L38 11l-2.5 10q-5.5 3-11 0Z';
const SIDES = 'M44 25v3c-1.33-1.67-2.67-4.67-4-9-2.66 1.33-6 2-10 2s-7.34-.67-10-2c-1.33 3.67-2.67 6.33-4 8v-2a14 14 0 1 1 28 0Z';
const TEMPLES = 'M14.6 19h5.8l-1.9 9.5q-.3 1.3-1.5 1.3h-1.5ZM45.4 19h-5.8l1.9 9.5q.3 1.3 1.5 1.3h1.5Z';

const LAYERS = {
  head: { head: blend(head, 'skin') + put(24, 28, blend(part('nose', 'mediumRound'), 'skin')) },
  garment: {
    tee: clothes('squared'),
    checks: clothes('checkered'),
    stripes: torso('{cloth}', [8, 13, 18].map((y) => path(`M0 ${y}h42v2.5H0Z`, '#fff', 0.8)).join('')),
    jacket: torso('{cloth}', path('M13 0 21 21 29 0Z', '#fff') + path('M21 12.5 19 15 20 21h2l1-6Z', DARK)
      + path('m15.5 4-4 5 4 3-2 2 7.5 7ZM26.5 4l4 5-4 3 2 2-7.5 7Z', '{cloth shade}')),
    turtleneck: clothes('rounded') + put(11, 44, path('M15 3.5h12v6a6 4 0 0 1-12 0Z', '{cloth glow}', 0.35) + path('M15 3.5h12v6.5a6 3.5 0 0 1-12 0Z', '{cloth}')
      + path('M15 3.5h12v3.2h-12ZM15 9.6a6 3.5 0 0 0 12 0v1.4a6 3.5 0 0 1-12 0Z', '{cloth shade}', 0.45)),
    dress: torso('{skin}', path('M8 21V11l2.5-6h2.4l.4 5q7.7 5 15.4 0l.4-5h2.4L34 11v10Z', '{cloth}')),
  },
  beard: {
    moustache: beard('walrus'),
    goatee: beard('goatee').replace('<path ', '<path stroke="{hair}" stroke-width=".9" '),
    full: beard('beardMustache').replace(/<path d="M22 13.42[^>]*>/, '') + opening,
  },
  mouth: {
    smile: mouth('smile'),
    frown: mouth('frown'),
    open: mouth('surprise'),
    grin: put(32, 42.4, path('M-5-2.8H5V-1A5 5 0 0 1-5-1Z', DARK) + path('M-4.2-2.2H4.2V-1Q0 1.2-4.2-1Z', '#fff')),
    lips: mouth('lips'),
  },
  eyes: {
    open: dot(25.5, 28.5) + dot(38.5, 28.5),
    closed: arc(25.5, 28.2) + arc(38.5, 28.2),
    wink: dot(25.5, 28.5) + arc(38.5, 28.2),
    glasses: eyes('glasses'),
    sunglasses: eyes('sunglasses'),
  },
  hair: {
    bald: put(2, 2, blend(part('hair', 'balding'), 'skin').replace('<path ', '<path stroke="{hair}" ')),
    short: hair('shortCombover'),
    curly: hair('curlyHighTop'),
    afro: hair('curly'),
    bob: hair('bobBangs'),
    long: hair('long'),
    'very long': hair('extraLong'),
    pigtails: hair('pigtails'),
    bun: put(2, 2, '<circle cx="30" cy="6.5" r="6.5" fill="{hair}"/>' + path(FRINGE, '{hair}') + path(FRINGE, '{hair glow}', 0.26) + path('M24.5 9.5q5.5-2.5 11 0v1.8q-5.5-2.5-11 0Z', '#F55D81')),
    mohawk: put(2, 2, path(SIDES, '{hair}', 0.35) + path(CREST, '{hair}') + path('M27.5 21 27 12l3 3 3-3-.5 9Z', '{hair glow}', 0.26)),
    cap: put(2, 2, path(TEMPLES, '{hair}') + blend(part('hair', 'cap'), '').replaceAll('#F29C65', '#ECEEF6')),
    beanie: put(2, 2, path(TEMPLES, '{hair}') + path('M15.2 21.5C13.5 3 46.5 3 44.8 21.5Z', '#D8434F')
      + path('M15.5 17.8q14.5-5.5 29 0l.7 5q-15-5.8-30.4 0Z', '#9C2A3C') + '<circle cx="30" cy="5.5" r="3.3" fill="#F6EEF0"/>'),
  },
};

// Straight colours and coverage of a drawing, moved right by a share of a pixel: RGBA, premultiplied.
function pixels(svg, lit, shift) {
  const coloured = svg.replaceAll(/\{([a-z ]+)\}/g, (_, role) => (role === lit ? '#ffffff' : '#000000'));
  const whole = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="${-shift} 0 64 64" width="${SIZE}" height="${SIZE}" fill="none">${coloured}</svg>`;
  return new Resvg(whole).render().pixels;
}

const names = [], planes = [];
for (const [group, layers] of Object.entries(LAYERS)) for (const [name, svg] of Object.entries(layers)) {
  names.push(`${group}/${name}`);
  for (let phase = 0; phase < PHASES; phase++) {
    const dark = pixels(svg, '', phase / PHASES);
    const plane = (from, channel, less) => Buffer.from(Array.from({ length: SIZE * SIZE }, (_, i) => Math.max(0, from[4 * i + channel] - (less ? less[4 * i + channel] : 0))));
    for (const role of ROLES) planes.push(plane(pixels(svg, role, phase / PHASES), 0, dark));
    for (const channel of [0, 1, 2, 3]) planes.push(plane(dark, channel));
  }
}
const atlas = Buffer.concat(planes);
const sha256 = crypto.createHash('sha256').update(atlas).digest('hex');
fs.writeFileSync('atlas.bin', atlas);
fs.writeFileSync('atlas.json', JSON.stringify({ sha256, roles: ROLES, phases: PHASES, layers: names }, null, 1) + '\n');
console.log(names.length, 'layers');

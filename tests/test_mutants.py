"""The tests can fail: kernels with one mistake each, and each is found by a comparison that the suite makes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.kit.drawn import ONE_PROGRAM, SHORT, SHORT_SECONDS, SMALL, Drawn
from tests.kit.inside import fewer_programs, several_launches_over_time
from tests.kit.modules import pair
from tests.kit.mutants import SETTINGS, mutant, outcome, table
from tritongru import status as status_words
from tritongru.kernels.exchange import Wait
from tritongru.launch import exchange
from tritongru.tools.emulator import TWINS, EmulatorError, twins

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of NaNs, and of addresses
]

# By file, setting and how they are found, if their names do not say so: what of the file's text becomes what.
MUTANTS = r"""
gates.py, step: wrong
    gates swapped | r = sigmoid({a_r=>a_z})\n    z = sigmoid({a_z=>a_r})
    update turned round | h = {n=>h_prev} + z * ({h_prev - n=>n - h_prev})
    reset before the sum | tanh({a_n + r * q=>r * (a_n + q)})
    no reset | tanh(a_n + {r * q=>q})
    tanh's far branch without its sign | far = {tl.where(x < 0.0, -far, far)=>far}
    dn without 1 - z | dn = dh{ * (1.0 - z)=>} * (1.0 - n * n)
    dn without tanh' | dn = dh * (1.0 - z){ * (1.0 - n * n)=>}
    dz without h_prev | dz = dh * ({h_prev=>0.0} - n)
    dz without n | dz = dh * {(h_prev - n)=>h_prev}
    dz without sigmoid' | {* z * (1.0 - z)=>}\n
    dq without r | dq = dn{ * r=>}
    dr without q | dr = dn{ * q=>} * r * (1.0 - r)
    dr without sigmoid' | dr = dn * q{ * r * (1.0 - r)=>}
step.py, step: wrong
    products of r and z swapped | acc_r = product(acc_r, left, {w_r=>w_z},
    product of n dropped | {acc_n = product(acc_n, left, w_n, FORM)=>pass}
    x_proj of n dropped | add((a_r, a_z, {a_n=>0.0 * a_n}), {x_proj=>(x_proj[0], x_proj[1], 0 * x_proj[2])})
    b_hn inside the input part | a_r, a_z, {q=>a_n} = add((a_r, a_z, {q=>a_n}), b_hh)
    K mask one short | (k < {K=>K - 1})
    units' mask one short | h_mask = offs_h < {H=>H - 1}\n
    h not handed on | store({h_next_ptrs=>h_prev_ptrs},
    h_n each step | y, mask & {~=>}goes_on[:, None])
    gates not saved | if SAVE_GATES{=> and H == 0}:\n
    r and z swapped in the memory of x_proj | store_rzn(rzn_ptrs, {r, z=>z, r}, n,
    n not saved | store_rzn(rzn_ptrs, r, z, {n=>x_proj[2]},
    q not saved | offs_h, q, {mask=>mask & (H == 0)})
    x_proj of the other direction | ((at.to(tl.int64) * stride_rzn_t + offs_b * stride_rzn_b) * D{ + direction=>})
    r, z, n of the other direction | ((dst.to(tl.int64) * stride_rzn_t + offs_b * stride_rzn_b) * D{ + direction=>})
    q of the other direction | q_ptr + {of_dst=>row_dst * D * H}
    dgates of the other direction | dgates_ptr += {direction * size_rows * (4 * H)=>0}
    dh * z dropped | dh_prev += {dh_src=>0.0} * z_src
    dr W_hr dropped | product(acc, {=>0.0 * }dr,
    dz W_hz dropped | product(acc, {=>0.0 * }dz,
    dq W_hn dropped | product(acc, {=>0.0 * }dq,
    dy dropped | return dh_n + {=>0.0 * }dy,
    dh_n dropped | return {=>0.0 * }dh_n + dy,
    h_prev of the wrong step | y_ptr + {of_before=>of_dst}
    h_0 never read | tl.where(at.carries[:, None], y, {h_0=>y})
    dh_0 of rows that go on | {(in_src & ~goes_on)=>goes_on}
step.py, step packed: emulator
    a unit too many | h_mask = offs_h < {H=>H + 1}\n
    K too long | (k < {K=>K + 1})
step.py, one step: wrong
    dh * z dropped | {        dh_prev += dh_src * z_src.to(tl.float32)\n=>}
    dgates not stored | {store_gradients(dgates_dst[:, None] + offs_h[None, :], dq, dr, dz, dn, mask_dst, H)=>pass}
    dh_n dropped in the first launch | in_dst & {~in_src=>in_src})
    x product dropped | if {FUSE_INPUT=>H == 0}:\n        x_ptrs
    b_in dropped | a_r, a_z, {a_n=>_} = add((a_r, a_z, a_n), b_ih)
rows.py, step packed: wrong
    emulator: a row too many | here = offs_b {<=><=} rows
    every row carries | here{ & (offs_b < rows_neighbour)=>}
    no row carries | here & (offs_b < {rows_neighbour=>0})
    a row too few | here = offs_b < {rows=>rows - 1}
    wrong direction | tl.where(direction == {0=>1}, forward, reverse)
rows.py, step cut: wrong
    a reset one step late | resets_ptr + (t + direction{=> + (t < 2)})
    a length too short | here = here & (t < {length=>length - 1})
    the neighbour runs always | both & here{ & (t_neighbour < length)=>}
    resets forward alone | mask = here & {(carries | (direction == 0))=>(direction == 0)}
step.py, step cut: wrong
    the state but not its gradient | {        dh_prev = tl.where(src_anew[:, None], 0.0, dh_prev)\n=>}
    the state but not what is multiplied | h_prev_ptrs, {enters=>runs}, 1,
    what is multiplied but not the state | mask_h = {enters=>runs}[:, None]
    h_prev of another sequence | load_own(at_dst, {dst_anew=>~in_dst},
small.py, fma: wrong
    products of r and z swapped | a_r = product({w_r=>w_z}, h_all,
    product of n dropped | q = {own_sums(q, FORM)=>0.0 * x_n.to(gl.float32)} +
    x_proj of r dropped | + {(x_r.to(gl.float32) + b_hr)=>b_hr}
    x_proj of n dropped | {=>0.0 * }x_n.to(gl.float32), q, h)
    x_proj of the first visit for all | {x[1:]=>x[:1] + x[2:]} + (x_ahead,)
    x_proj of a visit too early | at_last = place_of(t_ahead{ + step_t=>},
    b_hz dropped | {(x_z.to(gl.float32) + b_hz)=>x_z.to(gl.float32)}
    b_hn dropped | FORM){ + b_hn=>}
    h_0 never read | h = {=>0.0 * }gl.load(h_0_ptr + tile.of_state,
    h not handed on | h = gl.where(runs{=> & (visit < 1)}, h_new, h)
    h handed over too late | {hand_over(h_shared, h.to(dtype), FORM)=>h_all = received(h_shared, FORM)}\n        \
        {h_all = received(h_shared, FORM)=>hand_over(h_shared, h.to(dtype), FORM)}
    units' mask one short | is_unit = unit < {H=>H - 1}\n
    dh * z dropped | dh = gl.where(runs, {dh * z=>0.0 * dh}, dh)
    dh without z | dh = {gl.where(runs, dh * z, dh)=>dh}
    products dropped | dh + {=>0.0 * }own_sums(parts,
    dz for dr | product(w_r, received({dr_shared=>dz_shared},
    dq W_hn dropped | parts += {=>0.0 * }product(w_n,
    weights not transposed | if TRANSPOSED {=>and gate != 1 }else
    dy dropped | {        dh += dy.to(gl.float32)\n=>}
    dh_n dropped | dh = {=>0.0 * }gl.load(dh_n_ptr + tile.of_state,
    h_prev of the wrong step | timestep(memory.y, {at_before=>at},
    h_0 never read in backward | {gl.where(begins, h_0, h_prev)=>h_prev}
    gates of the last visit for all | {given[1:]=>given[:1] + given[2:]} + (given_ahead,)
    dh_0 not made | & (want_dh {!= 0=>== 0}))
    the larger half kept | parts = gl.{sum=>max}(gl.convert_layout(parts,
    the largest part for the sum | gl.{sum=>max}(parts, 2)
    emulator: dgates a visit off | timestep(dgates, at[{0=>1}], VECTOR)
small.py, fma both: wrong
    other direction's weights | {gl.where(direction == 0, w_ptr, w_reverse_ptr)=>w_ptr}
    other direction's biases | b_ptr = {gl.where(direction == 0, b_ptr, b_reverse_ptr)=>b_ptr + 0}
    dgates of the other direction | times({direction=>0} * size_rows,
    emulator: h_prev of a row that has not begun | (t_before < tile.length{=> + 1})
small.py, no bias: wrong
    a bias where there is none | is_unit{ & (has_bias != 0)=>}
small.py, matrix: wrong
    weights in the order of memory | {place // 16 * 16 + place % 8 * 2 + place % 16 // 8=>place}
    h in the order of memory | .permute([1, {3, 2=>2, 3}, 0])
    sums in the order of the instruction | parts.permute([3, 0, {2, 1=>1, 2}])
small.py, matrix packed: wrong
    a row that starts early | h = gl.where({runs=>is_unit}, h_new, h)
    a row that does not run goes through its gate | dh = {gl.where(runs, dh * z, dh)=>dh * z}
    h_0 at the first timestep alone | (t + step_t >= {tile.length=>T})
    emulator: reverse begins at the last timestep of all | direction == 0, 0, {longest - 1=>T - 2})
    emulator: lengths of the row before | lengths_of({row, row >= 0=>row - 1, row >= 1},
small.py, matrix cut: wrong
    a reset one step late | clear = cleared(t{ + step_t=>}, tile,
    the state not cleared | {        h = gl.where(clear & is_unit, 0.0, h)\n=>}
    dh not cleared | dh = {gl.where(clear, 0.0, dh + own_sums(parts, FORM))=>dh + own_sums(parts, FORM)}
    h_prev of another sequence | {gl.where(clear, 0.0, =>(}gl.where(begins,
    h_0 of a row that begins anew | { & ~anew=>}, other
sequence.py, three programs: wrong
    time-out: a slot too far | publish(place + {=>2 * }group.slot + group.own,
    time-out: h is never published | \
        {publish(place + group.slot + group.own, as_factor(h_next[i].to(dtype), PRECISION))=>pass}
    time-out: dz published over dr | publish(own{ + GATE=>}, as_factor(
    time-out: a wait on the wrong slot | place = here{=> + group.slot} + i * SIZE\n
    time-out: units past H are not published | \
        publish(place + {group.slot=>gl.where(unit < H, group.slot, 0)} + group.own,
    time-out: a wait on the wrong slot in backward | publish(own{=> + group.slot}, as_factor(gl.where(runs & ~clear, dr
    time-out: h_0 unpublished | {publish(here + i * SIZE + group.own, as_factor(h[i].to(dtype), PRECISION))=>pass}
    time-out: backward begins without zeros | {publish(here + (3 * i + gate) * GATE + group.own, nothing)=>pass}
    emulator: h_0 of rows past the batch | mask={begin.inside & (first_visit == 0)=>(begin.row >= 0)} & ~anew
    the slot before | (at_last,), {here + group.slot=>here}
    a sum not written | {sums[0].store(add_product(zeros, h, weights, 0, 0, FORM))=>pass}
    a gate dropped | sums[1].store({add_product(zeros, h, weights, 1, 0, FORM)=>zeros})
    h not handed on | {h, x = h_next, x_next=>x = x_next}
    x_proj of the first visit for all | {h, x = h_next, x_next=>h = h_next}
    gates of the last visit for all | carry{, given=>} = carry_next{, given_next=>}
    h_prev of the wrong step | timestep(memory.y, {at_before=>at})
    dz W_hz dropped | {acc = add_product(acc, seen, weights, 1, PARTS, FORM)=>pass}
    gates swapped | add_product(zeros, h, weights, {0=>1},
    a part of the sum dropped | gl.{sum=>max}(buffer.load(summed(
    the first warp's K for all | {warp * K_OF_WARP + k=>k}
    b_hn dropped | {            q += b_hn\n=>}
sequence.py, two tiles: wrong
    a stale row tile | received({place=>here}.to(gl.int64)
    a stale row tile in backward | # wait, product\n            product = product_of_gradients({place=>here}, group
    resets of tile 0 | clear = cleared(t_next, {tile=>Tile(*tiles[0])},
visits.py, eight rows: time-out
    rows of programs past H | gl.max(gl.max({given=>gl.where(is_unit, given, 0)}, 0), 0)
sequence.py, packed both: wrong
    a row too early | h_new = gl.where({runs=>(t >= 0) & (T > 0)}, h_new, h[i])
    the carry of a row that does not run dropped | gl.where(runs, dh * z, {dh=>0.0})
    a row that does not run goes through its gate | {gl.where(runs, dh * z, dh)=>dh * z}
    reverse begins at the last timestep of all | {longest - 1=>T} - first_visit
    time-out: a row that does not run publishes nothing | \
        publish(place + {group.slot=>gl.where(runs, group.slot, 0)} + group.own,
sequence.py, two groups: wrong
    the first group's rows for all | first_row{ + gl.program_id(1) * (FORM.TILES * FORM.ROWS)=>}
sequence.py, two directions: wrong
    the first direction twice | direction = {first_direction + =>}gl.program_id(2)
    other direction's weights | {gl.where(direction == 0, w_ptr, w_reverse_ptr)=>w_ptr}
sequence.py, sequence cut: wrong
    the state but not its gradient | runs{ & ~clear=>}
    h_0 of a row that begins anew | { & ~anew=>}, other
    y after a reset | save(memory, at[0], tile, {h_new=>h_next[i]},
    not what is carried back | {gl.where(clear, 0.0, gl.where(runs, dh * z, dh))=>gl.where(runs, dh * z, dh)}
    another's h_prev | h_prev = {gl.where(clear, 0.0, h_prev.to(gl.float32))=>h_prev.to(gl.float32)}
visits.py, sequence cut: wrong
    emulator: a reset past a row's length | (boundary < {tile.length=>tile.length + 1})
    a reset one step late | boundary = t + direction{=> + 1}
    resets in the forward direction alone | mask=(t >= 0) &{=> (direction == 0) &}
sequence.py, three waits: wrong
    dq W_hn dropped | {acc = add_product(acc, dq, weights, 2, 0, FORM)=>pass}
    another gate's gradients | address + {2 * =>}BYTES
sequence.py, three tensors: wrong
    the first tensor for all | mma_v2(seen[FIRST{ + part=>}]
    weights of the first tensor | weights[GATE][{part=>0}].load(
gates.py, fma: wrong
    n not saved | {    tl.store(ptrs + 2 * H, n.to(dtype), mask=mask)\n=>}
    dn stored as dq | tl.store(ptrs + 3 * H, {dn=>dq}.to(dtype)
    dr stored as dz | tl.store(ptrs + H, {dr=>dz}.to(dtype)
gates.py, three programs: wrong
    dr stored as dz | tl.store(ptrs + H, {dr=>dz}.to(dtype)
    emulator: the next row's gates | tl.store(ptrs + {3=>4} * H, dn
visits.py, fma: wrong
    gates not saved | saves = runs & (save_gates {!= 0=>== 0})
    z saved as r | tile.of_x, {r=>z}, z, n, saves
    emulator: gates a visit too late | store_rzn(timestep(memory.rzn, {at=>at + 1},
visits.py, fma both: wrong
    x_proj of the other direction | stride_rzn_b * D{ + direction=>}) * (3 * H)
    y of the other direction | of_y = (b * D{ + direction=>}) * H
    dy of the other direction | {(direction.to(gl.int64) * H + unit)=>unit} * stride_dy_h
    state of the other direction | of_state = {(direction * batch.B + b)=>b}
visits.py, three programs: wrong
    gates not saved | saves = runs & (save_gates {!= 0=>== 0})
    emulator: y of rows past the batch | h.to(dtype), mask={runs=>tile.row < 16})
exchange.py, three programs: wrong
    a wrong place | unit // (128 // WIDTH) {* 2 + row // 8=>+ row // 8 * 2}
    a wrong first vector | part * ({HEIGHT=>8} * K_OF_WARP
    time-out: half of it published | , {cache_modifier=".cg"=>mask=ptrs.to(gl.int64) % 8 == 0}
    time-out: a wrong block | (unit // UNITS) * ({HEIGHT=>8} * UNITS)
exchange.py, half: time-out
    a wrong lane | + unit % {(128 // WIDTH) // (32 // WIDTH)=>(32 // WIDTH)}
exchange.py, eight rows: wrong
    a wrong place of 8 rows | register = unit // (128 // WIDTH) {=>^ 1 }if
"""


def mutants() -> Iterator[Any]:
    for (file, setting, most), (name, edit) in table(MUTANTS, 2):
        *told, name = name.split(": ")
        yield pytest.param(file, setting, (told or [most])[0], edit, id=f"{file}: {name}")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch) -> None:
    monkeypatch.setenv("TRITONGRU_WAIT_SECONDS", SHORT_SECONDS)


@pytest.fixture
def broken(tmp_path, monkeypatch) -> Callable[[str, str, str], None]:
    def broken(backend: str, file: str, edit: str) -> None:
        module = "small" if backend == SMALL else backend.split(":")[0]
        monkeypatch.setattr(f"tritongru.launch.{module}.kernels", mutant(tmp_path, file, edit, module=module))

    return broken


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_kernels_as_they_are_survive(setting: str, monkeypatch) -> None:
    assert outcome(setting, monkeypatch) == "survived"


@pytest.mark.parametrize(("file", "setting", "how", "edit"), [*mutants()])
def test_mutant_is_killed(file: str, setting: str, how: str, edit: str, broken, monkeypatch) -> None:
    broken(SETTINGS[setting].backend, file, edit)
    assert outcome(setting, monkeypatch) == how


def test_units_past_h_that_take_a_state_are_killed(broken) -> None:
    """Zero times an infinity of the units before is NaN."""
    drawn = Drawn(ONE_PROGRAM)
    drawn.put("h_0", float("-inf"))
    drawn.assert_not_finite_as_nn_gru(drawn.of_ours(0))
    broken(SMALL, "small.py", "        runs = (t < tile.length){ & is_unit=>}\n        h =")
    with pytest.raises((AssertionError, EmulatorError)):
        drawn.assert_not_finite_as_nn_gru(drawn.of_ours(0))


@pytest.mark.parametrize(
    ("backend", "edit"),
    [
        ("step", "store(state_ptr + of_state, offs_h, {h=>y}, mask)"),
        (SMALL, "h = gl.where(runs, h_new, h){=>.to(dtype).to(gl.float32)}"),
        ("sequence", "h_new = gl.where(runs, h_new, h[i]){=>.to(dtype).to(gl.float32)}"),
        ("sequence", "h[i]{=>.to(dtype).to(gl.float32)}.to(gl.int32, bitcast=True)"),  # between launches over time
    ],
)
@torch.no_grad()
def test_a_state_that_is_rounded_is_killed(backend: str, edit: str, broken, monkeypatch) -> None:
    """Where z is near 1 a step changes h by less than bfloat16 can hold."""
    truth, layer = pair(backend, 3, 16, dtype=torch.bfloat16)
    for module in (truth, layer):
        module.bias_hh_l0[16:32] += 7.0
    x = torch.randn(120, 2, 3, dtype=torch.bfloat16) + 1
    true = truth.double()(x.double())[0]
    several_launches_over_time(monkeypatch, 1)
    kept = (layer(x)[0].double() - true).norm()
    broken(backend, "small.py" if backend == SMALL else f"{backend}.py", edit)
    assert (layer(x)[0].double() - true).norm() > 4 * kept


def looks_once(patch: pytest.MonkeyPatch) -> None:
    def once(wait: Wait) -> None:
        patch.setitem(TWINS, wait.text, lambda turn, address, *_, dtype: twins.look(wait, turn, address, dtype))

    patch.setattr(twins, "register", once)


def zeroes_nothing(patch: pytest.MonkeyPatch) -> None:
    """Blocks that nobody owns."""
    made = exchange.Buffer.__init__
    patch.setattr(exchange.Buffer, "__init__", lambda self, shape, *of: made(self, shape._replace(owned=1 << 20), *of))


def clears_the_word(patch: pytest.MonkeyPatch) -> None:
    """And tells nobody, so that it is no time-out. The kernel's own stores are tests/test_wait.py's."""
    fewer_programs(patch)
    patch.setattr(status_words.Status, "check", lambda self: (self.word.zero_(), self.report.zero_()))


@pytest.mark.parametrize(
    ("mistake", "how"),
    [
        (looks_once, "wrong"),
        (lambda patch: patch.setattr(exchange, "SENTINEL", 0), "wrong"),
        (zeroes_nothing, "time-out"),
        (fewer_programs, "time-out"),
        (clears_the_word, "wrong"),
    ],
    ids=["a wait that looks once", "no fill", "blocks without zeros", "a missing program", "a word that is cleared"],
)
def test_a_mistake_of_the_host_is_killed(mistake: Callable[..., None], how: str, monkeypatch) -> None:
    mistake(monkeypatch)
    assert outcome("three programs", monkeypatch) == how


def test_a_sentinel_that_is_published_is_killed(broken, monkeypatch) -> None:
    """By test_exchange.py's dy with the sentinel's bits, which arithmetic hands on."""
    drawn = Drawn(SETTINGS["three programs"])
    drawn.put("dy", None)
    broken("sequence", "exchange.py", "{gl.where(bits == -1, quiet_nan, bits)=>bits}")
    drawn.of_ours(0, **SHORT)
    with pytest.raises(RuntimeError, match="TRITONGRU_WAIT_SECONDS"):
        status_words.check_all()

"""Runs the PTX of a kernel on the processor: one program at a time, its lanes in lockstep, as NumPy.

For emulated_triton.py, which says what is a finding. Programs run in random order, and so do atomic
additions; memory and registers that nobody has written are poisoned; approximate instructions err by
up to what their manual allows (EMU_NOISE=0: by nothing; EMU_RACE=0: nobody looks for races). What it
does not know is an error. It knows what Triton makes of this project's kernels, and is as dense as
it was when it was written: to be cut into rooms.
"""

import os
import random
import re

import numpy as np

RACE = os.environ.get("EMU_RACE", "1") == "1"
NOISE = os.environ.get("EMU_NOISE", "1") == "1"
np.seterr(all="ignore")
U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64


class Mem:
    def __init__(self, dt):
        class A:
            pass

        a = A()
        s = np.dtype(dt).itemsize
        a.__array_interface__ = {
            "shape": (((1 << 47) - 4096) // s,),
            "typestr": np.dtype(dt).str,
            "data": (4096, False),
            "version": 3,
        }
        self.v = np.asarray(a)
        self.s = s
        self.o = 4096 // s


MEM = {s: Mem(d) for s, d in ((1, U8), (2, U16), (4, U32), (8, U64))}
MEM = {s: (m.v, m.o) for s, m in MEM.items()}
WIDTH = {"8": 1, "16": 2, "32": 4, "64": 8}
UT = {1: U8, 2: U16, 4: U32, 8: U64}


class Fault(Exception):
    pass


FINDINGS = {}


def finding(kind, text):
    key = (kind, text)
    FINDINGS[key] = FINDINGS.get(key, 0) + 1


# ---------- arithmetic helpers
def f32(x):
    return x.view(np.float32)


def f64(x):
    return x.view(np.float64)


def i32(x):
    return x.view(np.int32)


def i64(x):
    return x.view(np.int64)


def i16(x):
    return x.view(np.int16)


def cf32(x):
    x = np.ascontiguousarray(x, np.float32)
    b = x.view(U32)
    n = np.isnan(x)
    return np.where(n, U32(0x7FFFFFFF), b) if n.any() else b


def cf64(x):
    return np.ascontiguousarray(x, np.float64).view(U64)


def ftz(x):
    b = x.view(U32)
    d = (b & U32(0x7F800000)) == 0
    return np.where(d, b & U32(0x80000000), b).view(np.float32) if d.any() else x


def fma32(a, b, c):
    return (a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)).astype(
        np.float32
    )


def fma64(a, b, c):
    p = a * b
    S = 134217729.0
    t = a * S
    ah = t - (t - a)
    al = a - ah
    t = b * S
    bh = t - (t - b)
    bl = b - bh
    e = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    s = p + c
    bb = s - p
    er = (p - (s - bb)) + (c - bb)
    r = s + (er + e)
    return np.where(np.isfinite(r), r, p + c)


def bf2f(h):
    return (h.astype(U32) << U32(16)).view(np.float32)


def f2bf(x):
    b = np.ascontiguousarray(x, np.float32).view(U32)
    r = ((b + U32(0x7FFF) + ((b >> U32(16)) & U32(1))) >> U32(16)).astype(U16)
    return np.where(np.isnan(x), U16(0x7FFF), r)


def h2f(h):
    return h.view(np.float16).astype(np.float32)


def f2h(x):
    r = x.astype(np.float16).view(U16)
    return np.where(np.isnan(x), U16(0x7FFF), r)


def noise(y, x, ulps):
    """An error of an approximate instruction, the same for the same x: up to `ulps` last places."""
    if not NOISE:
        return y
    b = y.view(U32).copy()
    k = x.view(U32)
    h = (k * U32(2654435761)) >> U32(29)
    d = (h.astype(np.int64) % (2 * ulps + 1)) - ulps
    ok = np.isfinite(y) & (np.abs(y) > 1e-37) & (np.abs(y) < 3e38) & (x != np.round(x))
    return np.where(ok, (b.astype(np.int64) + d).astype(U32), b).view(np.float32)


def ex2(x, flush):
    if flush:
        x = ftz(x)
    y = np.exp2(x.astype(np.float64)).astype(np.float32)
    y = noise(y, x, 2)
    return ftz(y) if flush else y


def lg2(x):
    return noise(np.log2(x.astype(np.float64)).astype(np.float32), x, 1)


def rcp64(x):
    b = (1.0 / x).view(U64) & U64(0xFFFFFFFF00000000)
    return b


def rzi(x, bits):
    lo, hi = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1)
    t = np.trunc(x.astype(np.float64))
    nan = np.isnan(t)
    d = np.int32 if bits == 32 else np.int64
    big, small = t >= hi, t < lo
    r = np.where(nan | big | small, 0, t).astype(d)
    r = np.where(big, np.iinfo(d).max, np.where(small, np.iinfo(d).min, r))
    r = np.where(nan, 0 if bits == 32 else np.iinfo(d).min, r)
    return r.astype(d).view(U32 if bits == 32 else U64)


def shl(a, n, bits):
    n = n.astype(U64) if not np.isscalar(n) else n
    m = np.minimum(n, bits - 1).astype(a.dtype)
    return np.where(n >= bits, a.dtype.type(0), a << m)


def shru(a, n, bits):
    n = n.astype(U64) if not np.isscalar(n) else n
    m = np.minimum(n, bits - 1).astype(a.dtype)
    return np.where(n >= bits, a.dtype.type(0), a >> m)


def shrs(a, n, bits):
    s = {16: np.int16, 32: np.int32, 64: np.int64}[bits]
    n = n.astype(U64) if not np.isscalar(n) else n
    m = np.minimum(n, bits - 1).astype(s)
    return (a.view(s) >> m).view(a.dtype)


def bfe(a, p, l, signed):
    p = p & 255
    l = l & 255
    v = (a >> np.minimum(p, 31).astype(U32)).astype(np.int64)
    m = (np.int64(1) << np.minimum(l, 32).astype(np.int64)) - 1
    v = np.where(p > 31, 0, v & m)
    if signed:
        sb = np.where(l > 0, (v >> np.maximum(l.astype(np.int64) - 1, 0)) & 1, 0)
        v = np.where(sb == 1, v | ~m, v)
    return v.astype(np.int64).astype(U32)


def prmt(a, b, s):
    by = [((a >> U32(8 * i)) & U32(255)) for i in range(4)] + [
        ((b >> U32(8 * i)) & U32(255)) for i in range(4)
    ]
    by = np.stack(by)
    out = np.zeros_like(a)
    s = np.broadcast_to(s, a.shape).astype(U32)
    for i in range(4):
        sel = (s >> U32(4 * i)) & U32(15)
        v = np.take_along_axis(by, (sel & 7).astype(np.int64)[None], 0)[0]
        v = np.where(sel & 8, np.where(v & U32(128), U32(255), U32(0)), v)
        out |= v.astype(U32) << U32(8 * i)
    return out


_POP = np.array([bin(i).count("1") for i in range(65536)], U32)


def popc(a):
    if a.dtype == U64:
        return popc((a & U64(0xFFFFFFFF)).astype(U32)) + popc((a >> U64(32)).astype(U32))
    return _POP[a & U32(0xFFFF)] + _POP[a >> U32(16)]


def idiv(a, b):
    b_ = np.where(b == 0, 1, b)
    if a.dtype.kind == "u":
        return np.where(b == 0, ~a.dtype.type(0), a // b_)
    q = np.abs(a) // np.abs(b_)
    return (np.where((a < 0) != (b_ < 0), -q, q)).astype(a.dtype)


def irem(a, b):
    return (a - idiv(a, b) * b).astype(a.dtype)


def max_nan(a, b):
    return np.where(np.isnan(a) | np.isnan(b), np.float32(np.nan), fmx(a, b))


def fmx(a, b):
    r = np.fmax(a, b)
    z = (a == 0) & (b == 0)
    return (
        np.where(z, np.where(np.signbit(a) & np.signbit(b), np.float32(-0.0), np.float32(0.0)), r)
        if z.any()
        else r
    )


def fmn(a, b):
    r = np.fmin(a, b)
    z = (a == 0) & (b == 0)
    return (
        np.where(z, np.where(np.signbit(a) | np.signbit(b), np.float32(-0.0), np.float32(0.0)), r)
        if z.any()
        else r
    )


def maxnan_pair(a, b, w, n):
    lo = lambda x: (x & U32(0xFFFF)).astype(U16)
    hi = lambda x: (x >> U32(16)).astype(U16)
    m = lambda x, y: n(max_nan(w(x), w(y)))
    return m(lo(a), lo(b)).astype(U32) | (m(hi(a), hi(b)).astype(U32) << U32(16))


# ---------- state of a CTA
class Shadow:
    def __init__(self, lo, hi, name):
        n = (hi - lo + 3) // 2
        self.lo, self.name = lo, name
        self.cta = np.full(n, -1, np.int32)
        self.ep = np.zeros(n, np.int32)
        self.we = np.zeros(n, np.int32)
        self.thr = np.full(n, -1, np.int32)
        self.at = np.zeros(n, bool)
        self.rcta = np.full(n, -1, np.int32)
        self.rep = np.zeros(n, np.int32)
        self.rwe = np.zeros(n, np.int32)
        self.rthr = np.full(n, -1, np.int32)
        self.rmulti = np.zeros(n, bool)


# Of a matrix of 16 bits, which a lane of a warp holds: two beside each other.
ROW, COLUMN = np.arange(32) // 4, 2 * (np.arange(32) % 4)


class CTA:
    def __init__(self, T, ctaid, nctaid, params, shared, extents, kname):
        self.T, self.W = T, T // 32
        self.tid = np.arange(T, dtype=U32)
        self.lane = self.tid & U32(31)
        self.ctaid, self.nctaid, self.params = ctaid, nctaid, params
        self.shm = np.full(shared + 16, 0xA5, U8)
        self.nshared = shared
        self.ext, self.kname = extents, kname
        self.epoch = 1
        self.wepoch = np.ones(self.W, np.int32)
        self.cta = ctaid[0] + ctaid[1] * nctaid[0]
        self.warp = np.arange(T) // 32
        self.ssh = Shadow(0, shared + 16, "shared") if RACE else None

    # -- global
    def _check(self, a, size, line):
        if (a % size != 0).any():
            raise Fault(
                f"{self.kname}: misaligned global access of {size} bytes: {hex(int(a[a % size != 0][0]))} line {line}"
            )
        los, his = self.ext[0], self.ext[1]
        i = np.searchsorted(los, a, side="right") - 1
        bad = (i < 0) | (a + size > his[np.maximum(i, 0)])
        if bad.any():
            raise Fault(
                f"{self.kname}: global access outside of all tensors, {size} bytes at {hex(int(a[bad][0]))}, lane {np.flatnonzero(bad)[:4]}, line {line}"
            )
        return i

    def ldg(self, addr, mask, size, vec, line):
        act = np.flatnonzero(mask)
        if act.size == 0:
            return act, [np.zeros(0, UT[size])] * vec
        a = addr[act]
        i = self._check(a, size * vec, line)
        if RACE:
            self._race(i, a, size * vec, act, False, False, line, None)
        v, o = MEM[size]
        base = (a // U64(size)).astype(np.int64) - o
        return act, [v[base + j] for j in range(vec)]

    def stg(self, addr, mask, size, vals, line):
        act = np.flatnonzero(mask)
        if act.size == 0:
            return
        a = addr[act]
        i = self._check(a, size * len(vals), line)
        v, o = MEM[size]
        base = (a // U64(size)).astype(np.int64) - o
        same = np.ones(act.size, bool)
        if RACE:
            for j, x in enumerate(vals):
                same &= v[base + j] == x[act].astype(UT[size])
            u, first, inv = np.unique(a, return_index=True, return_inverse=True)
            if u.size < a.size:
                for x in vals:
                    y = x[act].astype(UT[size])
                    if (y != y[first][inv]).any():
                        finding(
                            "store of different values to one address by one instruction",
                            f"{self.kname} line {line}",
                        )
            self._race(i, a, size * len(vals), act, True, False, line, same)
        for j, x in enumerate(vals):
            v[base + j] = x[act].astype(UT[size])

    def atomic_add(self, addr, mask, size, val, line):
        act = np.flatnonzero(mask)
        out = np.zeros(act.size, UT[size])
        if act.size == 0:
            return act, out
        a = addr[act]
        i = self._check(a, size, line)
        if RACE:
            self._race(i, a, size, act, True, True, line, None)
        v, o = MEM[size]
        base = (a // U64(size)).astype(np.int64) - o
        x = np.broadcast_to(val, mask.shape)[act].astype(UT[size])
        order = list(range(act.size))
        random.shuffle(order)
        for k in order:
            out[k] = v[base[k]]
            v[base[k]] = v[base[k]] + x[k]
        return act, out

    def _race(self, idx, a, size, act, write, atomic, line, same):
        for e in np.unique(idx):
            sh = self.ext[2][e]
            if sh is None:
                continue
            s = idx == e
            g = ((a[s] - U64(sh.lo)) >> U64(1)).astype(np.int64)
            thr = act[s]
            sm = None if same is None else same[s]
            n = max(1, size // 2)
            if n > 1:
                g = (g[:, None] + np.arange(n)[None]).ravel()
                thr = np.repeat(thr, n)
                sm = None if sm is None else np.repeat(sm, n)
            self._mark(sh, g, thr, write, atomic, line, sm)

    def _mark(self, sh, g, thr, write, atomic, line, same):
        w = self.warp[thr]
        if (
            (not write or atomic)
            and sh.name
            in (
                "found_ptr",
                "places_ptr",
                "found_ptr|places_ptr",
                "pieces_ptr",
                "list_ptr",
                "quotas_ptr",
                "draws_ptr",
            )
            and (sh.cta[g] < 0).any()
        ):
            finding("uninitialised read", f"{self.kname} {sh.name} line {line}")
        # against earlier writes
        has = sh.cta[g] >= 0
        if has.any():
            other_cta = has & (sh.cta[g] != self.cta)
            inside = has & (sh.cta[g] == self.cta) & (sh.thr[g] != thr) & (sh.ep[g] == self.epoch)
            cross = inside & (self.warp[np.maximum(sh.thr[g], 0)] != w)
            intra = inside & ~cross & (sh.we[g] == self.wepoch[w])
            if atomic:
                ok = sh.at[g]
                other_cta &= ~ok
                cross &= ~ok
                intra &= ~ok
            if write and same is not None:
                other_cta &= ~same
                cross &= ~same
                intra &= ~same
            kind = "write-write" if write else "write-read"
            self._tell(kind, sh, line, other_cta, cross, intra)
        if write:
            has = sh.rcta[g] >= 0
            if has.any():
                other_cta = has & (sh.rcta[g] != self.cta)
                inside = (
                    has
                    & (sh.rcta[g] == self.cta)
                    & (sh.rep[g] == self.epoch)
                    & ((sh.rthr[g] != thr) | sh.rmulti[g])
                )
                cross = inside & (self.warp[np.maximum(sh.rthr[g], 0)] != w)
                intra = inside & ~cross & (sh.rwe[g] == self.wepoch[w])
                if same is not None:
                    other_cta &= ~same
                    cross &= ~same
                    intra &= ~same
                self._tell("read-write", sh, line, other_cta, cross, intra)
            sh.cta[g] = self.cta
            sh.thr[g] = thr
            sh.ep[g] = self.epoch
            sh.we[g] = self.wepoch[w]
            sh.at[g] = atomic
        else:
            again = (sh.rcta[g] == self.cta) & (sh.rep[g] == self.epoch) & (sh.rthr[g] != thr)
            # keep a reader of another warp if there is one
            sh.rmulti[g] = again
            sh.rcta[g] = self.cta
            sh.rthr[g] = thr
            sh.rep[g] = self.epoch
            sh.rwe[g] = self.wepoch[w]

    def _tell(self, kind, sh, line, other_cta, cross, intra):
        for m, where in (
            (other_cta, "between programs"),
            (cross, "between warps"),
            (intra, "within a warp"),
        ):
            if m.any():
                finding(f"{kind} {where}", f"{self.kname} {sh.name} line {line}")

    # -- shared
    def _scheck(self, a, size, line):
        if (a % size != 0).any():
            raise Fault(f"{self.kname}: misaligned shared access line {line}")
        if (a + size > self.nshared).any():
            raise Fault(f"{self.kname}: shared access beyond {self.nshared} line {line}")

    def lds(self, addr, mask, size, vec, line):
        act = np.flatnonzero(mask)
        if act.size == 0:
            return act, [np.zeros(0, UT[size])] * vec
        a = addr[act].astype(np.int64)
        self._scheck(a, size * vec, line)
        if RACE:
            self._smark(a, size * vec, act, False, line)
        v = self.shm[: self.nshared // size * size].view(UT[size])
        b = a // size
        return act, [v[b + j] for j in range(vec)]

    def sts(self, addr, mask, size, vals, line):
        act = np.flatnonzero(mask)
        if act.size == 0:
            return
        a = addr[act].astype(np.int64)
        self._scheck(a, size * len(vals), line)
        v = self.shm[: self.nshared // size * size].view(UT[size])
        b = a // size
        same = np.ones(act.size, bool)
        for j, x in enumerate(vals):
            same &= v[b + j] == np.broadcast_to(x, mask.shape)[act].astype(UT[size])
        if RACE:
            self._smark(a, size * len(vals), act, True, line, same)
        for j, x in enumerate(vals):
            v[b + j] = np.broadcast_to(x, mask.shape)[act].astype(UT[size])

    def _smark(self, a, size, act, write, line, same=None):
        if size == 1:
            return
        g = a >> 1
        n = size // 2
        thr = act
        g = (g[:, None] + np.arange(n)[None]).ravel()
        thr = np.repeat(thr, n)
        same = None if same is None else np.repeat(same, n)
        self._mark(self.ssh, g, thr, write, False, line, same)

    def full_warps(self, mask, what, line):
        m = mask.reshape(self.W, 32)
        if not ((m.all(1)) | (~m.any(1))).all():
            finding(f"{what} with a part of a warp", f"{self.kname} line {line}")

    def shfl(self, mode, a, b, c, mask, line):
        self.full_warps(mask, "shfl", line)
        lane = self.lane.astype(np.int64)
        b = np.broadcast_to(b, mask.shape).astype(np.int64)
        c = int(np.broadcast_to(c, mask.shape)[0])
        seg, clamp = (c >> 8) & 31, c & 31
        maxl = (lane & seg) | (clamp & ~seg)
        minl = lane & seg
        if mode == "bfly":
            j = lane ^ b
            p = j <= maxl
        elif mode == "up":
            j = lane - b
            p = j >= maxl
        elif mode == "down":
            j = lane + b
            p = j <= maxl
        else:
            j = minl | (b & ~seg)
            p = j <= maxl
        j = np.where(p, j, lane) + (self.warp * 32)
        return a[j], p

    def redux(self, op, a, mem, mask, line):
        mem = np.broadcast_to(mem, mask.shape).astype(np.int64)
        out = a.copy()
        for w in range(self.W):
            sl = slice(32 * w, 32 * w + 32)
            m = mask[sl]
            if not m.any():
                continue
            lanes = np.flatnonzero(m)
            for mm in np.unique(mem[sl][lanes]):
                part = np.array([l for l in range(32) if (int(mm) >> l) & 1])
                if not m[part].all():
                    finding("redux with lanes that are not there", f"{self.kname} line {line}")
                x = a[sl][part]
                if op == "add.s32" or op == "add.u32":
                    r = U32(int(x.astype(np.int64).sum()) & 0xFFFFFFFF)
                elif op == "max.s32":
                    r = x.view(np.int32).max().astype(np.int32).view(U32)
                elif op == "min.s32":
                    r = x.view(np.int32).min().astype(np.int32).view(U32)
                elif op == "max.u32":
                    r = x.max()
                elif op == "min.u32":
                    r = x.min()
                elif op in ("max.NaN.f32", "min.NaN.f32", "max.f32", "min.f32"):
                    y = x.view(np.float32)
                    n = np.isnan(y)
                    if ("NaN" in op and n.any()) or n.all():
                        r = U32(0x7FFFFFFF)
                    else:
                        y = y[~n]
                        y = (
                            np.where(
                                y == 0,
                                np.where(np.signbit(y), np.float32(-1e-45), np.float32(0)),
                                y,
                            )
                            if (y == 0).any()
                            else y
                        )
                        r = np.array([y.max() if "max" in op else y.min()], np.float32)
                        r = np.where(r == np.float32(-1e-45), np.float32(-0.0), r).view(U32)[0]
                else:
                    raise Fault(op)
                o = out[sl]
                o[part] = r
        return out

    def _matrices(self, what, n, addr, mask, write, line):
        """Of each warp at work its lanes, and of each of its n matrices which and where it lies."""
        self.full_warps(mask, what, line)
        addr = np.broadcast_to(addr, mask.shape).astype(np.int64)
        for first in range(0, self.T, 32):
            if not mask[first]:
                continue
            for m in range(n):
                lanes = np.arange(first + 8 * m, first + 8 * m + 8)
                self._scheck(addr[lanes], 16, line)
                if RACE:
                    self._smark(addr[lanes], 16, lanes, write, line)
                at = (addr[lanes] // 2)[:, None] + np.arange(8)[None]
                yield slice(first, first + 32), m, at

    def ldmatrix(self, n, trans, addr, mask, line):
        outs = [np.zeros(self.T, U32) for _ in range(n)]
        h = self.shm[: self.nshared // 2 * 2].view(U16)
        for warp, m, at in self._matrices("ldmatrix", n, addr, mask, False, line):
            M = (h[at].T if trans else h[at]).astype(U32)
            outs[m][warp] = M[ROW, COLUMN] | (M[ROW, COLUMN + 1] << U32(16))
        return outs

    def stmatrix(self, n, trans, addr, vals, mask, line):
        h = self.shm[: self.nshared // 2 * 2].view(U16)
        for warp, m, at in self._matrices("stmatrix", n, addr, mask, True, line):
            x = vals[m][warp]
            M = np.zeros((8, 8), U16)
            M[ROW, COLUMN] = (x & U32(0xFFFF)).astype(U16)
            M[ROW, COLUMN + 1] = (x >> U32(16)).astype(U16)
            h[at] = M.T if trans else M


def poison(T, kind):
    if kind == "p":
        return np.arange(T) % 2 == 0
    return np.full(
        T,
        {
            "rs": 0xFFEE,
            "r": 0xFFEEDEAD,
            "rd": 0xFFF8DEADBEEFDEAD,
            "f": 0xFFEEDEAD,
            "fd": 0xFFF8DEADBEEFDEAD,
        }[kind],
        {"rs": U16, "r": U32, "rd": U64, "f": U32, "fd": U64}[kind],
    )


# ---------- translation
CMP = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


class Program:
    def __init__(self, ptx):
        m = re.search(r"\.visible \.entry (\w+)\((.*?)\)\s*(.*?)\{", ptx, re.S)
        self.name = m.group(1)
        self.params = re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+_param_\d+)", m.group(2))
        self.pindex = {n: i for i, (_, n) in enumerate(self.params)}
        self.T = int(re.search(r"\.reqntid (\d+)", m.group(3)).group(1))
        body_at = m.end()
        end = ptx.index("// -- End function", body_at) if "// -- End function" in ptx else len(ptx)
        lineno = ptx.count("\n", 0, body_at) + 1
        self.regs = {}
        self.kinds = []
        text = ptx[body_at:end]
        stmts = []
        src = "?"
        for off, raw in enumerate(text.split("\n")):
            lm = re.match(r"\s*\.loc\s+\d+\s+\d+\s+\d+.*//\s*(\S+)", raw)
            if lm:
                src = lm.group(1)
            line = re.sub(r"//.*", "", raw).strip()
            if not line or line.startswith(".loc") or line.startswith(".pragma"):
                continue
            stmts.append((line, src, lineno + off))
        # join and split by ;
        items = []
        buf = ""
        bsrc = None
        for line, s, _ in stmts:
            if re.match(r"^[$\w]+:$", line):
                items.append(("label", line[:-1], s))
                continue
            buf += " " + line
            bsrc = s
            while ";" in buf:
                st, buf = buf.split(";", 1)
                st = st.strip()
                items.append(("ins", st, bsrc))
            if buf.strip() in ("}", "{", "} }"):
                buf = ""
        self.blocks = []
        self.labels = {}
        cur = []

        def close():
            nonlocal cur
            self.blocks.append(cur)
            cur = []

        tmp = 0
        ren = {}
        for kind, st, s in items:
            if kind == "label":
                if cur:
                    close()
                self.labels[st] = len(self.blocks)
                continue
            while st.startswith("{") and not st.startswith("{ %"):
                st = st[1:].strip()
                ren = {}
                tmp += 1
            while st.startswith("}"):
                st = st[1:].strip()
                ren = {}
            if not st:
                continue
            if (
                st.startswith(".param")
                or st.startswith("st.param")
                or re.match(r"@?!?(%p\d+ )?st\.param", st)
            ):
                continue
            if st.startswith("call") or st.startswith("("):
                st = "assertfail " if "__assertfail" in st else st
            if st.startswith(".reg"):
                m2 = re.match(r"\.reg\s+\.(\w+)\s+(.*)", st)
                for nm in m2.group(2).split(","):
                    nm = nm.strip()
                    if "<" in nm:
                        continue
                    new = f"%{ {'pred': 'p', 'b16': 'rs', 'b32': 'r', 'f32': 'r', 'b64': 'rd'}[m2.group(1)] }9{tmp:05d}{len(ren)}"
                    ren[nm] = new
                continue
            for a, b in ren.items():
                st = re.sub(rf"(?<![\w%]){re.escape(a)}(?!\w)", b, st)
            cur.append((st, s))
            op = re.sub(r"^@!?%p\d+\s+", "", st).split()[0]
            if (
                op.split(".")[0] in ("bra", "ret", "exit", "trap")
                or op.startswith("bar.sync")
                or op.startswith("barrier")
            ):
                close()
        if cur:
            close()
        self.code = []
        for b in self.blocks:
            self.code.append(self.compile_block(b))

    def reg(self, name):
        if name not in self.regs:
            self.regs[name] = len(self.kinds)
            self.kinds.append(re.match(r"%([a-z]+)", name).group(1))
        return self.regs[name]

    def val(self, tok, ty):
        """source expression as unsigned numpy array or scalar of the width of ty"""
        tok = tok.strip()
        w = (
            {"pred": 0}.get(ty)
            if ty == "pred"
            else int(
                re.sub(
                    r"\D",
                    "",
                    ty.replace("bf16x2", "b32").replace("f16x2", "b32").replace("bf16", "b16"),
                )
                or 32
            )
            // 8
        )
        if tok.startswith("%"):
            if tok == "%tid.x":
                return "S.tid"
            if tok == "%laneid":
                return "S.lane"
            m = re.match(r"%ctaid\.(\w)", tok)
            if m:
                return f"np.full(S.T, S.ctaid[{'xyz'.index(m.group(1))}], U32)"
            m = re.match(r"%nctaid\.(\w)", tok)
            if m:
                return f"np.full(S.T, S.nctaid[{'xyz'.index(m.group(1))}], U32)"
            if tok == "%ntid.x":
                return "np.full(S.T, S.T, U32)"
            return f"R[{self.reg(tok)}]"
        if ty == "pred":
            return "TRUE" if tok not in ("0",) else "FALSE"
        if tok.startswith("0f"):
            v = int(tok[2:], 16)
        elif tok.startswith("0d"):
            v = int(tok[2:], 16)
        elif tok == "global_smem":
            v = 0
        elif tok.startswith("_$_str"):
            v = 0
        elif not re.match(r"^-?\d", tok):
            v = 0
        else:
            v = int(tok.rstrip("U"), 0)
        v &= (1 << (8 * w)) - 1
        t = {1: "U8", 2: "U16", 4: "U32", 8: "U64"}[w]
        return f"np.full(S.T, {v}, {t})"

    def compile_block(self, block):
        out = []
        term = None
        for st, src in block:
            m = re.match(r"^@(!?)(%p\d+)\s+(.*)$", st)
            pred = None
            if m:
                pred = (m.group(1), m.group(2))
                st2 = m.group(3)
            else:
                st2 = st
            parts = st2.split(None, 1)
            op = parts[0]
            rest = parts[1] if len(parts) > 1 else ""
            args = self.split(rest)
            mask = "M"
            if pred:
                p = f"R[{self.reg(pred[1])}]"
                mask = f"(M & {'~' if pred[0] else ''}{p})"
            if op.split(".")[0] == "bra":
                term = ("bra", args[0], None if not pred else (pred[0], self.reg(pred[1])))
                continue
            if op in ("ret", "exit"):
                term = ("ret", None, None if not pred else (pred[0], self.reg(pred[1])))
                continue
            if op.startswith("bar.sync"):
                term = ("bar", None, None)
                continue
            if op == "assertfail":
                out.append(f"if M.any(): raise Fault('{self.name}: device assert, line {src}')")
                continue
            if op.startswith("trap"):
                out.append("raise Fault('trap')")
                continue
            out += self.ins(op, args, mask, pred is not None, src, st)
        body = "\n".join("    " + l for l in out) or "    pass"
        self.src = getattr(self, "src", {})
        self.src[len(self.src)] = body
        code = f"def block(S, R, M, FULL):\n{body}\n"
        ns = dict(globals())
        exec(compile(code, f"<{self.name} {len(self.src) - 1}>", "exec"), ns)
        return ns["block"], term

    @staticmethod
    def split(rest):
        out, depth, cur = [], 0, ""
        for ch in rest:
            if ch in "{[":
                depth += 1
            if ch in "}]":
                depth -= 1
            if ch == "," and depth == 0:
                out.append(cur.strip())
                cur = ""
            else:
                cur += ch
        if cur.strip():
            out.append(cur.strip())
        return out

    def set(self, dst, expr, mask, predicated):
        if dst == "_":
            return []
        r = self.reg(dst)
        if predicated:
            return [f"R[{r}] = np.where({mask}, {expr}, R[{r}])"]
        return [f"R[{r}] = ({expr}) if FULL else np.where(M, {expr}, R[{r}])"]

    def addr(self, tok, width):
        t = tok.strip()[1:-1].strip()
        m = re.match(r"^([%\w$]+)\s*(?:\+\s*(-?\w+))?$", t)
        base, off = m.group(1), int(m.group(2) or "0", 0)
        if base == "global_smem":
            return f"np.full(S.T, {off}, U32)"
        b = f"R[{self.reg(base)}]"
        if off:
            b = f"({b} + {'U64' if base.startswith('%rd') else 'U32'}({off & ((1 << 64) - 1 if base.startswith('%rd') else (1 << 32) - 1)}))"
        return b

    def braces(self, tok):
        tok = tok.strip()
        return [t.strip() for t in tok[1:-1].split(",")] if tok.startswith("{") else [tok]

    def ins(self, op, a, mask, pr, src, st):
        p = op.split(".")
        o = p[0]
        ty = p[-1]
        L = repr(src)
        V = self.val
        S = lambda e: self.set(a[0], e, mask, pr)
        bits = lambda t: int(re.search(r"\d+", t).group())
        try:
            if o == "ld":
                if "param" in p:
                    i = self.pindex[a[1].strip("[] ").split("+")[0]]
                    w = bits(ty) // 8
                    dw = {"rs": 2, "r": 4, "rd": 8}[self.kinds[self.reg(a[0])]]
                    e = f"np.full(S.T, S.params[{i}] & {(1 << 8 * w) - 1}, U{8 * w})"
                    if ty[0] == "s" and dw != w:
                        e = f"{e}.view(np.int{8 * w}).astype(np.int{8 * dw}).view(U{8 * dw})"
                    elif dw != w:
                        e = f"{e}.astype(U{8 * dw})"
                    return S(e)
                size = bits(ty) // 8
                d = self.braces(a[0])
                fn = "lds" if any(x.startswith("shared") for x in p) else "ldg"
                lines = [f"_i, _v = S.{fn}({self.addr(a[1], size)}, {mask}, {size}, {len(d)}, {L})"]
                for j, x in enumerate(d):
                    if x == "_":
                        continue
                    r = self.reg(x)
                    t = {"rs": "U16", "r": "U32", "rd": "U64"}[self.kinds[r]]
                    e = f"_v[{j}]" + (
                        f".view(np.int{8 * size}).astype(np.int64)" if ty[0] == "s" else ""
                    )
                    lines += [f"_t = R[{r}].copy(); _t[_i] = {e}.astype({t}); R[{r}] = _t"]
                return lines
            if o == "st":
                size = bits(ty) // 8
                d = self.braces(a[1])
                fn = "sts" if any(x.startswith("shared") for x in p) else "stg"
                vals = ", ".join(V(x, ty) for x in d)
                return [f"S.{fn}({self.addr(a[0], size)}, {mask}, {size}, [{vals}], {L})"]
            if o in ("atom", "red"):
                assert "add" in p
                size = bits(ty) // 8
                if o == "red":
                    return [
                        f"S.atomic_add({self.addr(a[0], size)}, {mask}, {size}, {V(a[1], ty)}, {L})"
                    ]
                r = self.reg(a[0])
                return [
                    f"_i, _v = S.atomic_add({self.addr(a[1], size)}, {mask}, {size}, {V(a[2], ty)}, {L})",
                    f"_t = R[{r}].copy(); _t[_i] = _v; R[{r}] = _t",
                ]
            if o == "mov":
                if a[0].startswith("{"):
                    d = self.braces(a[0])
                    w = bits(ty) // len(d)
                    x = V(a[1], ty)
                    out = []
                    out.append(f"_x = {x}")
                    for j, n in enumerate(d):
                        if n != "_":
                            out += self.set(
                                n,
                                f"((_x >> _x.dtype.type({w * j})) & _x.dtype.type({(1 << w) - 1})).astype(U{w})",
                                mask,
                                pr,
                            )
                    return out
                if a[1].startswith("{"):
                    d = self.braces(a[1])
                    w = bits(ty) // len(d)
                    return S(
                        " | ".join(
                            f"({V(x, f'b{w}')}.astype(U{bits(ty)}) << U{bits(ty)}({w * j}))"
                            for j, x in enumerate(d)
                        )
                    )
                return S(V(a[1], ty))
            if o == "setp" and p[-1] in ("bf16x2", "f16x2"):
                c = p[1]
                w = "bf2f" if p[-1] == "bf16x2" else "h2f"
                d = a[0].split("|")
                out = []
                for j, n in enumerate(d):
                    x, y = (f"{w}(({V(q, 'b32')} >> U32({16 * j})).astype(U16))" for q in a[1:3])
                    if c in ("nan", "num"):
                        e = f"(np.isnan({x}) | np.isnan({y}))"
                        e = e if c == "nan" else f"(~{e})"
                    else:
                        e = f"({x} {CMP[c[:2]]} {y})"
                    if c not in ("nan", "num") and c[2:] == "u":
                        e = f"({e} | np.isnan({x}) | np.isnan({y}))"
                    elif c == "ne":
                        e = f"({e} & ~(np.isnan({x}) | np.isnan({y})))"
                    out += [f"_q{j} = {e}"]
                for j, n in enumerate(d):
                    out += self.set(n, f"_q{j}", mask, pr)
                return out
            if o == "setp":
                c, t = p[1], p[-1]
                if t in ("bf16", "f16"):
                    conv = (lambda e: f"bf2f({e})") if t == "bf16" else (lambda e: f"h2f({e})")
                elif t == "f32":
                    conv = lambda e: f"f32({e})"
                elif t == "f64":
                    conv = lambda e: f"f64({e})"
                elif t[0] == "s":
                    conv = lambda e: f"({e}).view(np.int{bits(t)})"
                else:
                    conv = lambda e: e
                x, y = conv(V(a[1], t)), conv(V(a[2], t))
                if "ftz" in p:
                    x, y = f"ftz({x})", f"ftz({y})"
                isf = t[0] == "f" or t == "bf16"
                if c == "num":
                    e = f"~(np.isnan({x}) | np.isnan({y}))"
                elif c == "nan":
                    e = f"(np.isnan({x}) | np.isnan({y}))"
                elif c in CMP:
                    e = f"({x} {CMP[c]} {y})"
                    if isf and c == "ne":
                        e = f"({e} & ~(np.isnan({x}) | np.isnan({y})))"
                elif isf and c[-1] == "u" and c[:-1] in CMP:
                    e = f"(({x} {CMP[c[:-1]]} {y}) | np.isnan({x}) | np.isnan({y}))"
                elif c in ("lo", "ls", "hi", "hs"):
                    e = f"({x} {dict(lo='<', ls='<=', hi='>', hs='>=')[c]} {y})"
                else:
                    raise KeyError(op)
                if len(p) > 3 and p[2] in ("and", "or", "xor"):
                    e = f"({e} {dict(zip(('and', 'or', 'xor'), '&|^'))[p[2]]} {V(a[3], 'pred')})"
                return S(e)
            if o == "selp":
                return S(f"np.where({V(a[3], 'pred')}, {V(a[1], ty)}, {V(a[2], ty)})")
            if o in ("and", "or", "xor"):
                return S(f"{V(a[1], ty)} {dict(zip(('and', 'or', 'xor'), '&|^'))[o]} {V(a[2], ty)}")
            if o == "not":
                return S(f"~{V(a[1], ty)}")
            if o == "cvta":
                return S(V(a[1], ty))
            if o == "popc":
                return S(f"popc({V(a[1], ty)})")
            if o == "prmt":
                return S(f"prmt({V(a[1], 'b32')}, {V(a[2], 'b32')}, {V(a[3], 'b32')})")
            if o == "bfe":
                return S(
                    f"bfe({V(a[1], 'b32')}, {V(a[2], 'b32')}, {V(a[3], 'b32')}, {ty[0] == 's'})"
                )
            if o == "shl":
                return S(f"shl({V(a[1], ty)}, {V(a[2], 'b32')}, {bits(ty)})")
            if o == "shr":
                return S(
                    f"{'shrs' if ty[0] == 's' else 'shru'}({V(a[1], ty)}, {V(a[2], 'b32')}, {bits(ty)})"
                )
            if o == "shfl":
                d = a[0].split("|")
                out = [
                    f"_x, _p = S.shfl('{p[2]}', {V(a[1], 'b32')}, {V(a[2], 'b32')}, {V(a[3], 'b32')}, {mask}, {L})"
                ]
                out += self.set(d[0], "_x", mask, pr)
                if len(d) > 1:
                    out += self.set(d[1], "_p", mask, pr)
                return out
            if o == "redux":
                return S(
                    f"S.redux('{'.'.join(p[2:])}', {V(a[1], 'b32')}, {V(a[2], 'b32')}, {mask}, {L})"
                )
            if o == "bar" and p[1] == "warp":
                return [
                    f"S.full_warps({mask}, 'bar.warp.sync', {L}); S.wepoch[{mask}.reshape(S.W, 32).any(1)] += 1"
                ]
            if o == "ldmatrix":
                d = self.braces(a[0])
                out = [
                    f"_v = S.ldmatrix({len(d)}, {'trans' in p}, {self.addr(a[1], 4)}, {mask}, {L})"
                ]
                for j, x in enumerate(d):
                    out += self.set(x, f"_v[{j}]", mask, pr)
                return out
            if o == "stmatrix":
                d = self.braces(a[1])
                return [
                    f"S.stmatrix({len(d)}, {'trans' in p}, {self.addr(a[0], 4)}, [{', '.join(V(x, 'b32') for x in d)}], {mask}, {L})"
                ]
            if o == "cvt":
                dt, stt = p[-2], p[-1]
                x = V(a[1], stt)
                if dt in ("bf16x2", "f16x2"):
                    n = "f2bf" if dt == "bf16x2" else "f2h"
                    return S(
                        f"({n}(f32({V(a[1], 'f32')})).astype(U32) << U32(16)) | {n}(f32({V(a[2], 'f32')})).astype(U32)"
                    )
                isf = lambda t: t in ("f32", "f64", "bf16", "f16")
                if isf(stt):
                    y = {
                        "f32": f"f32({x})",
                        "f64": f"f64({x})",
                        "bf16": f"bf2f({x})",
                        "f16": f"h2f({x})",
                    }[stt]
                    if isf(dt):
                        return S(
                            {
                                "f32": f"cf32(({y}).astype(np.float32))",
                                "f64": f"cf64(({y}).astype(np.float64))",
                                "bf16": f"f2bf(({y}).astype(np.float32))",
                                "f16": f"f2h(({y}).astype(np.float32))",
                            }[dt]
                        )
                    assert "rzi" in p and dt in ("s32", "s64"), op
                    return S(f"rzi({y}, {bits(dt)})")
                y = (
                    f"({x}).astype(U{bits(stt)}).view(np.int{bits(stt)})"
                    if stt[0] == "s"
                    else f"({x})"
                )
                if isf(dt):
                    return S(
                        {
                            "f32": f"({y}).astype(np.float32).view(U32)",
                            "f64": f"({y}).astype(np.float64).view(U64)",
                        }[dt]
                    )
                # register of the source may be wider than its type
                y = f"({x}).astype(U{bits(stt)})"
                if stt[0] == "s":
                    y = f"{y}.view(np.int{bits(stt)})"
                dk = self.kinds[self.reg(a[0])]
                wd = {"rs": 16, "r": 32, "rd": 64}[dk]
                return S(
                    f"({y}).astype(np.{'int' if stt[0] == 's' else 'uint'}{max(wd, bits(dt))}).astype(U{bits(dt)}).astype(U{wd})"
                )
            if (
                len(p) > 2
                and p[-2] == "f32"
                and ty in ("bf16", "f16")
                and o in ("add", "sub", "fma")
            ):
                w = "bf2f" if ty == "bf16" else "h2f"
                x = f"{w}({V(a[1], 'b16')})"
                if o == "fma":
                    return S(f"cf32(fma32({x}, {w}({V(a[2], 'b16')}), f32({V(a[3], 'f32')})))")
                return S(f"cf32({x} {'+' if o == 'add' else '-'} f32({V(a[2], 'f32')}))")
            # arithmetic
            isf = ty in ("f32", "f64")
            if isf:
                F = (lambda e: f"f32({e})") if ty == "f32" else (lambda e: f"f64({e})")
                C = "cf32" if ty == "f32" else "cf64"
                xs = [F(V(x, ty)) for x in a[1:]]
                if "ftz" in p and o not in ("ex2",) and ty == "f32":
                    xs = [f"ftz({x})" for x in xs]
                wrap = (
                    (lambda e: f"{C}(ftz({e}))")
                    if "ftz" in p and ty == "f32"
                    else (lambda e: f"{C}({e})")
                )
                if o == "add":
                    return S(wrap(f"{xs[0]} + {xs[1]}"))
                if o == "sub":
                    return S(wrap(f"{xs[0]} - {xs[1]}"))
                if o == "mul":
                    return S(wrap(f"{xs[0]} * {xs[1]}"))
                if o == "fma" or o == "mad":
                    return S(
                        wrap(f"{'fma32' if ty == 'f32' else 'fma64'}({xs[0]}, {xs[1]}, {xs[2]})")
                    )
                if o == "div":
                    return S(wrap(f"{xs[0]} / {xs[1]}"))
                if o == "sqrt":
                    return S(wrap(f"np.sqrt({xs[0]})"))
                if o == "rcp" and ty == "f64":
                    return S(f"rcp64({xs[0]})")
                if o == "rcp":
                    return S(wrap(f"1 / {xs[0]}"))
                if o == "neg":
                    return S(
                        f"{V(a[1], ty)} ^ {'U32(0x80000000)' if ty == 'f32' else 'U64(0x8000000000000000)'}"
                    )
                if o == "abs":
                    return S(
                        f"({'ftz(' if 'ftz' in p else ''}{F(V(a[1], ty))}{')' if 'ftz' in p else ''}).view({'U32' if ty == 'f32' else 'U64'}) & {'U32(0x7FFFFFFF)' if ty == 'f32' else 'U64(0x7FFFFFFFFFFFFFFF)'}"
                    )
                if o == "ex2":
                    return S(f"cf32(ex2({xs[0]}, {'ftz' in p}))")
                if o == "lg2":
                    return S(f"cf32(lg2({xs[0]}))")
                if o in ("max", "min") and len(xs) == 3:
                    assert "NaN" in p or True
                    fn = ("max_nan" if "NaN" in p else "fmx") if o == "max" else "fmn"
                    assert not ("NaN" in p and o == "min")
                    return S(f"{C}({fn}({fn}({xs[0]}, {xs[1]}), {xs[2]}))")
                if o == "max":
                    if "NaN" in p:
                        return S(f"{C}(max_nan({xs[0]}, {xs[1]}))")
                    return (
                        S(f"{C}(fmx({xs[0]}, {xs[1]}))")
                        if ty == "f32"
                        else S(f"{C}(np.fmax({xs[0]}, {xs[1]}))")
                    )
                if o == "min":
                    return (
                        S(f"{C}(fmn({xs[0]}, {xs[1]}))")
                        if ty == "f32"
                        else S(f"{C}(np.fmin({xs[0]}, {xs[1]}))")
                    )
                if o == "copysign":
                    return S(
                        f"({V(a[1], ty)} & {'U32(0x80000000)'}) | ({V(a[2], ty)} & U32(0x7FFFFFFF))"
                    )
            if ty in ("bf16x2", "f16x2") and o == "max":
                w, n = ("bf2f", "f2bf") if ty == "bf16x2" else ("h2f", "f2h")
                assert "NaN" in p
                return S(f"maxnan_pair({V(a[1], 'b32')}, {V(a[2], 'b32')}, {w}, {n})")
            if ty == "f32x2":
                c = {
                    "add": lambda a, b: f"{a} + {b}",
                    "sub": lambda a, b: f"{a} - {b}",
                    "mul": lambda a, b: f"{a} * {b}",
                    "fma": lambda a, b, d: f"fma32({a}, {b}, {d})",
                }[o]
                lo = [f"f32(({V(x, 'b64')} & U64(0xFFFFFFFF)).astype(U32))" for x in a[1:]]
                hi = [f"f32(({V(x, 'b64')} >> U64(32)).astype(U32))" for x in a[1:]]
                assert "ftz" not in p
                return S(f"cf32({c(*lo)}).astype(U64) | (cf32({c(*hi)}).astype(U64) << U64(32))")
            if ty in ("bf16x2", "f16x2") and o == "abs":
                return S(f"{V(a[1], 'b32')} & U32(0x7FFF7FFF)")
            if ty in ("bf16x2", "f16x2") and o == "neg":
                return S(f"{V(a[1], 'b32')} ^ U32(0x80008000)")
            if ty in ("bf16", "f16") and o == "abs":
                return S(f"{V(a[1], 'b16')} & U16(0x7FFF)")
            if ty in ("bf16", "f16") and o == "max":
                w, n = ("bf2f", "f2bf") if ty == "bf16" else ("h2f", "f2h")
                assert "NaN" in p
                return S(f"{n}(max_nan({w}({V(a[1], 'b16')}), {w}({V(a[2], 'b16')})))")
            sg = ty[0] == "s"
            n = bits(ty)
            I = (lambda e: f"({e}).view(np.int{n})") if sg else (lambda e: e)
            if o in ("mul", "mad") and "wide" in p:
                t = f"np.{'int' if sg else 'uint'}{2 * n}"
                e = f"({I(V(a[1], ty))}.astype({t}) * {I(V(a[2], ty))}.astype({t})).view(U{2 * n})"
                if o == "mad":
                    e = f"{e} + {V(a[3], f'b{2 * n}')}"
                return S(e)
            if o == "mul" and "hi" in p:
                assert n == 32
                t = f"np.{'int' if sg else 'uint'}64"
                return S(
                    f"(({I(V(a[1], ty))}.astype({t}) * {I(V(a[2], ty))}.astype({t})) >> {t}(32)).astype(np.uint64).astype(U32)"
                )
            if o == "mul":
                return S(f"{V(a[1], ty)} * {V(a[2], ty)}")
            if o == "mad":
                return S(f"{V(a[1], ty)} * {V(a[2], ty)} + {V(a[3], ty)}")
            if o == "add":
                return S(f"{V(a[1], ty)} + {V(a[2], ty)}")
            if o == "sub":
                return S(f"{V(a[1], ty)} - {V(a[2], ty)}")
            if o == "neg":
                return S(f"(~{V(a[1], ty)}) + {V(a[1], ty)}.dtype.type(1)")
            if o == "abs":
                return S(f"np.abs({I(V(a[1], ty))}).view(U{n})")
            if o in ("min", "max"):
                return S(
                    f"np.{'minimum' if o == 'min' else 'maximum'}({I(V(a[1], ty))}, {I(V(a[2], ty))}).view(U{n})"
                )
            if o == "div":
                return S(f"idiv({I(V(a[1], ty))}, {I(V(a[2], ty))}).view(U{n})")
            if o == "rem":
                return S(f"irem({I(V(a[1], ty))}, {I(V(a[2], ty))}).view(U{n})")
        except (KeyError, AssertionError, IndexError) as e:
            raise NotImplementedError(f"{st}  ({e!r})") from e
        raise NotImplementedError(st)

    def run(self, S):
        T = S.T
        R = [poison(T, k) for k in self.kinds]
        glob["TRUE"], glob["FALSE"] = np.ones(T, bool), np.zeros(T, bool)
        pc = np.zeros(T, np.int64)
        blocked = np.zeros(T, bool)
        done = np.zeros(T, bool)
        ALL = np.ones(T, bool)
        steps = 0
        uniform = 0  # pc of all, while there is one
        while True:
            steps += 1
            if steps > 2_000_000:
                raise Fault(f"{self.name}: does not end")
            if uniform is not None:
                cur, M, full = uniform, ALL, True
            else:
                live = ~(blocked | done)
                if not live.any():
                    if done.all():
                        return steps
                    w = ~done
                    if done.any():
                        finding("barrier that some threads have left", self.name)
                    if np.unique(pc[w]).size > 1:
                        finding("threads wait at different barriers", self.name)
                    S.epoch += 1
                    blocked[:] = False
                    if w.all() and (pc == pc[0]).all():
                        uniform = int(pc[0])
                    continue
                cur = int(pc[live].min())
                M = live & (pc == cur)
                full = bool(M.all())
            if cur >= len(self.code):
                if full:
                    return steps
                done |= M
                continue
            f, term = self.code[cur]
            f(S, R, M, full)
            nxt = cur + 1
            if term is None:
                if full:
                    uniform = nxt
                else:
                    pc[M] = nxt
            elif term[0] == "bar":
                if full:
                    S.epoch += 1
                    uniform = nxt
                    blocked[:] = False
                    pc[:] = nxt
                else:
                    pc[M] = nxt
                    blocked |= M
                continue
            else:
                kind, target, pred = term
                taken = M if pred is None else M & (~R[pred[1]] if pred[0] else R[pred[1]])
                if kind == "ret":
                    done |= taken
                    pc[M & ~taken] = nxt
                    if done.all():
                        return steps
                    uniform = None
                    if full and not taken.any():
                        uniform = nxt
                    continue
                t = self.labels[target]
                if full and taken.all():
                    uniform = t
                elif full and not taken.any():
                    uniform = nxt
                else:
                    if uniform is not None:
                        pc[:] = cur
                    uniform = None
                    pc[taken] = t
                    pc[M & ~taken] = nxt
                    if not (blocked.any() or done.any()) and (pc == pc[0]).all():
                        uniform = int(pc[0])
            if uniform is None and not (blocked.any() or done.any()) and (pc == pc[0]).all():
                uniform = int(pc[0])


glob = globals()
TRUE = FALSE = None
CACHE = {}
STATS = {}
ONLY_LAST = 0


def launch(ptx, grid, values, tensors, shared):
    """values: the parameters' bits; tensors: (low, high, name, shadow?)"""
    prog = CACHE.get(ptx)
    if prog is None:
        prog = CACHE[ptx] = Program(ptx)
    ts = sorted(tensors)
    merged = []
    for lo, hi, name in ts:
        if merged and lo < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], hi)
            merged[-1][2] += "|" + name
        else:
            merged.append([lo, hi, name])
    los = np.array([m[0] for m in merged] or [0], U64)
    his = np.array([m[1] for m in merged] or [0], U64)
    sh = [Shadow(m[0], m[1], m[2]) if RACE and m[1] - m[0] < (1 << 26) else None for m in merged]
    n = grid[0] * grid[1] * grid[2]
    order = range(n)
    if ONLY_LAST:
        order = [
            x + grid[0] * r
            for x in range(max(0, grid[0] - ONLY_LAST), grid[0])
            for r in range(grid[1] * grid[2])
        ]
    order = list(order)
    random.shuffle(order)
    # blocks refer to TRUE/FALSE by their own globals
    for f, _ in prog.code:
        f.__globals__["TRUE"] = np.ones(prog.T, bool)
        f.__globals__["FALSE"] = np.zeros(prog.T, bool)
    if grid[1] > 65535 or grid[2] > 65535:
        raise Fault("grid")
    for c in order:
        x, y, z = c % grid[0], c // grid[0] % grid[1], c // grid[0] // grid[1]
        S = CTA(prog.T, (x, y, z), grid, values, shared, (los, his, sh), prog.name)
        prog.run(S)
    STATS[prog.name] = STATS.get(prog.name, 0) + n

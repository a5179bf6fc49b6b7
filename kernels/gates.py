"""The gate math: written once, called by every kernel, in float32.

    r = sigmoid(a_r)                reset gate
    z = sigmoid(a_z)                update gate
    n = tanh(a_n + r * q)           candidate, with q the hidden part of it: the reset comes after the product
    h = n + z * (h_prev - n)        = (1 - z) * n + z * h_prev

where a_r, a_z hold the sums of both products and biases, a_n the input part of the candidate. The form of h is the one
PyTorch evaluates, so that infinities and NaNs spread alike.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)): no cancellation anywhere; exp overflows to inf below -88.7 and the quotient is then 0.

    Error against float64, with correctly rounded exp and division: at most 2.5 ulp for x >= -1; below it grows as
    |x| / 2 ulp, because exp multiplies the rounding of its argument (tests/test_gates_math.py measures both). On a GPU
    Triton's exp and division add at most 2 ulp each.
    """
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """tanh without the cancellation of 2 / (1 + exp(-2x)) - 1 near 0.

    |x| < 0.625: x + x^3 P(x^2), the degree-4 minimax polynomial of Cephes' tanhf (S. Moshier, netlib cephes,
    single/tanhf.c). Elsewhere: sign(x) (1 - 2 / (exp(2|x|) + 1)), whose subtraction loses no more than one bit.
    Error against float64: at most 2 ulp (tests/test_gates_math.py measures it). tanh(+-inf) = +-1, NaN stays NaN, -0
    becomes 0.
    """
    s = x * x
    p = -5.70498872745e-3
    p = p * s + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    near = x + x * s * p
    a = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    far = tl.where(x < 0.0, -far, far)
    return tl.where(a < 0.625, near, far)


@triton.jit
def gru_gates(a_r, a_z, a_n, q, h_prev):
    """One step of the cell from its four sums: returns h, r, z, n."""
    r = sigmoid(a_r)
    z = sigmoid(a_z)
    n = tanh(a_n + r * q)
    h = n + z * (h_prev - n)
    return h, r, z, n


@triton.jit
def gru_gate_gradients(dh, r, z, n, q, h_prev):
    """Gradients of the four sums from dh, the gradient arriving at h: returns dq, dr, dz, dn.

    dn is the gradient of a_n, dr of a_r, dz of a_z. With them dh_prev = dh * z + dr W_hr + dz W_hz + dq W_hn.
    """
    dn = dh * (1.0 - z) * (1.0 - n * n)
    dz = dh * (h_prev - n) * z * (1.0 - z)
    dq = dn * r
    dr = dn * q * r * (1.0 - r)
    return dq, dr, dz, dn


@triton.jit
def load_rzn(ptrs, mask, H):
    """Load three values H elements apart, of r, z and n: gates, x_proj, or biases. In the storage dtype."""
    r = tl.load(ptrs, mask=mask, other=0.0)
    z = tl.load(ptrs + H, mask=mask, other=0.0)
    n = tl.load(ptrs + 2 * H, mask=mask, other=0.0)
    return r, z, n


@triton.jit
def store_rzn(ptrs, r, z, n, mask, H):
    """Store r, z, n, H elements apart, cast to the dtype of the memory."""
    dtype = ptrs.dtype.element_ty
    tl.store(ptrs, r.to(dtype), mask=mask)
    tl.store(ptrs + H, z.to(dtype), mask=mask)
    tl.store(ptrs + 2 * H, n.to(dtype), mask=mask)


@triton.jit
def store_gradients(ptrs, dq, dr, dz, dn, mask, H):
    """Store dq, dr, dz, dn, H elements apart, cast to the dtype of the memory."""
    dtype = ptrs.dtype.element_ty
    tl.store(ptrs, dq.to(dtype), mask=mask)
    tl.store(ptrs + H, dr.to(dtype), mask=mask)
    tl.store(ptrs + 2 * H, dz.to(dtype), mask=mask)
    tl.store(ptrs + 3 * H, dn.to(dtype), mask=mask)

"""Non-local block."""

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["NonLocal2d"]


class NonLocal2d(nn.Module):
    r"""Every pixel attends to every other one (Wang et al., "Non-local Neural Networks", CVPR 2018, equations 1 to 6)::

        y[p] = sum over q of  softmax over q of (theta(x[p]) . phi(x[q]))  *  g(x[q])
        z    = x + norm(w(y))

    the embedded Gaussian form; theta, phi, g and w are 1x1 convolutions with ``channels // 2`` channels between. The
    norm begins at zero, so that a network with trained weights is not disturbed (section 3.3).

    Args:
        channels: of input and output.

    Shape:
        - Input, output: (N, channels, H, W). Time is quadratic in H·W, memory depends on torch's attention kernel.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 2
        self.theta, self.phi, self.g = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.w = nn.Conv2d(inner, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, input: Tensor) -> Tensor:
        query, key, value = (conv(input).flatten(2).transpose(1, 2) for conv in (self.theta, self.phi, self.g))
        attended = scaled_dot_product_attention(query, key, value, scale=1.0)
        return input + self.norm(self.w(attended.transpose(1, 2).unflatten(2, input.shape[2:])))

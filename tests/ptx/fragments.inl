// The one table of how a warp holds matrices in registers, typed from the manual "Parallel Thread Execution ISA". In
// version 9.2 these are the sections
//
//   9.7.14.5.7   Matrix Fragments for mma.m16n8k8
//   9.7.14.5.8   Matrix Fragments for mma.m16n8k16 with floating point type
//   9.7.14.5.15  Warp-level matrix load instruction: ldmatrix
//   9.7.14.5.17  Warp-level matrix transpose instruction: movmatrix
//
// A row is ELEMENT(instruction, operand, register, half, row, column): which element of the matrix is in that half (0:
// low; float registers have only half 0) of that register of a lane. `group` is lane / 4 and `thread` is lane % 4, as
// the manual's groupID and threadID_in_group. The emulator of the C++ tests is compared with it
// (test_cuda_emulator.cpp), and the PTX interpreter reads it (fragments.py).

// mma.m16n8k16: A is 16 x 16, B is 16 x 8, C and D are 16 x 8.
ELEMENT(m16n8k16, a, 0, 0, group, thread * 2)
ELEMENT(m16n8k16, a, 0, 1, group, thread * 2 + 1)
ELEMENT(m16n8k16, a, 1, 0, group + 8, thread * 2)
ELEMENT(m16n8k16, a, 1, 1, group + 8, thread * 2 + 1)
ELEMENT(m16n8k16, a, 2, 0, group, thread * 2 + 8)
ELEMENT(m16n8k16, a, 2, 1, group, thread * 2 + 9)
ELEMENT(m16n8k16, a, 3, 0, group + 8, thread * 2 + 8)
ELEMENT(m16n8k16, a, 3, 1, group + 8, thread * 2 + 9)
ELEMENT(m16n8k16, b, 0, 0, thread * 2, group)
ELEMENT(m16n8k16, b, 0, 1, thread * 2 + 1, group)
ELEMENT(m16n8k16, b, 1, 0, thread * 2 + 8, group)
ELEMENT(m16n8k16, b, 1, 1, thread * 2 + 9, group)
ELEMENT(m16n8k16, d, 0, 0, group, thread * 2)
ELEMENT(m16n8k16, d, 1, 0, group, thread * 2 + 1)
ELEMENT(m16n8k16, d, 2, 0, group + 8, thread * 2)
ELEMENT(m16n8k16, d, 3, 0, group + 8, thread * 2 + 1)

// mma.m16n8k8: A is 16 x 8, B is 8 x 8, C and D are 16 x 8.
ELEMENT(m16n8k8, a, 0, 0, group, thread * 2)
ELEMENT(m16n8k8, a, 0, 1, group, thread * 2 + 1)
ELEMENT(m16n8k8, a, 1, 0, group + 8, thread * 2)
ELEMENT(m16n8k8, a, 1, 1, group + 8, thread * 2 + 1)
ELEMENT(m16n8k8, b, 0, 0, thread * 2, group)
ELEMENT(m16n8k8, b, 0, 1, thread * 2 + 1, group)
ELEMENT(m16n8k8, d, 0, 0, group, thread * 2)
ELEMENT(m16n8k8, d, 1, 0, group, thread * 2 + 1)
ELEMENT(m16n8k8, d, 2, 0, group + 8, thread * 2)
ELEMENT(m16n8k8, d, 3, 0, group + 8, thread * 2 + 1)

// ldmatrix.m8n8.b16: register i is of matrix i, whose rows of 16 bytes are at the addresses of lanes 8*i to 8*i + 7.
ELEMENT(ldmatrix, d, 0, 0, group, thread * 2)
ELEMENT(ldmatrix, d, 0, 1, group, thread * 2 + 1)
ELEMENT(ldmatrix_trans, d, 0, 0, thread * 2, group)
ELEMENT(ldmatrix_trans, d, 0, 1, thread * 2 + 1, group)

// movmatrix.m8n8.trans.b16: where an element of the source matrix is before and after. The lane that holds row i,
// columns j and j + 1 of A then holds those of its transpose, which are rows j and j + 1, column i of A.
ELEMENT(movmatrix, a, 0, 0, group, thread * 2)
ELEMENT(movmatrix, a, 0, 1, group, thread * 2 + 1)
ELEMENT(movmatrix, d, 0, 0, thread * 2, group)
ELEMENT(movmatrix, d, 0, 1, thread * 2 + 1, group)
